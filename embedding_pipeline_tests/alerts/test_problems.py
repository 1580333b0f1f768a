"""One cause is one alert: which problems are consequences of others."""

import pytest

from embedding_pipeline.alerts.problems import (
    Findings,
    Kind,
    Problem,
    Root,
    without_consequences,
)

BOTH = frozenset({"docs.a", "docs.b"})
ONE = frozenset({"docs.a"})


def problem(kind: Kind, affected: frozenset[str] = ONE, **changes: object) -> Problem:
    values = {"summary": "it is broken", "remedy": "mend it", "affected": affected} | changes
    return Problem(kind, f"{kind} of {sorted(affected)}", **values)  # type: ignore[arg-type]


COVERAGE = problem(Kind.CHECK, check="coverage")
GOLDEN = problem(Kind.CHECK, check="golden_mrr")
FAILED_RUN = problem(Kind.RUN)
KILLED_RUN = problem(Kind.RUN, BOTH, own_cause=True)
FAILING_SENSOR = problem(Kind.SENSOR, BOTH)
STOPPED_SENSOR = problem(Kind.SENSOR, BOTH, own_cause=True)


@pytest.mark.parametrize(
    ("cause", "effect"),
    [
        (problem(Kind.PROVIDER, BOTH), FAILED_RUN),
        (problem(Kind.PROVIDER, BOTH), COVERAGE),
        (problem(Kind.COST_CAP, BOTH), COVERAGE),
        (problem(Kind.COLUMN, BOTH), FAILING_SENSOR),
        (problem(Kind.COLUMN, BOTH), FAILED_RUN),
        (problem(Kind.QUARANTINE), FAILED_RUN),
        (STOPPED_SENSOR, COVERAGE),
        (FAILED_RUN, COVERAGE),
        (KILLED_RUN, FAILED_RUN),
    ],
)
def test_a_consequence_is_not_told_and_not_over_either(cause: Problem, effect: Problem) -> None:
    found = without_consequences(Findings([effect, cause]))
    assert found.problems == [cause]
    assert found.unknown == {effect.key}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (problem(Kind.PROVIDER, BOTH), GOLDEN),  # wrong vectors have another cause
        (problem(Kind.PROVIDER, BOTH), STOPPED_SENSOR),
        (problem(Kind.PROVIDER, BOTH), KILLED_RUN),
        (problem(Kind.PROVIDER, frozenset({"docs.b"})), COVERAGE),  # of another column
        (problem(Kind.COLUMN, ONE), FAILING_SENSOR),  # of one column, the sensor of two
        (problem(Kind.COLUMN, BOTH), STOPPED_SENSOR),
        (problem(Kind.PROVIDER, BOTH), problem(Kind.CHANNEL, frozenset())),
        (FAILED_RUN, problem(Kind.RUN, frozenset({"docs.b"}))),
    ],
)
def test_what_has_its_own_cause_is_told(one: Problem, other: Problem) -> None:
    assert without_consequences(Findings([one, other])).problems == [one, other]


def test_what_waited_for_a_provider_is_being_caught_up_when_it_is_back() -> None:
    roots = [Root(Kind.PROVIDER, BOTH)]
    found = without_consequences(Findings([COVERAGE, GOLDEN, FAILED_RUN]), roots)
    assert found.problems == [GOLDEN]


def test_an_open_incident_does_not_explain_itself() -> None:
    roots = [Root(Kind.RUN, ONE)]
    assert without_consequences(Findings([FAILED_RUN]), roots).problems == [FAILED_RUN]
