"""What comes next in a table's night, whatever the facts."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.components.decide import ColumnFacts, RunInFlight, decide
from embedding_pipeline.components.decide_night import (
    MOST_ROUNDS,
    MOST_WAITING_SECONDS,
    NightFacts,
    decide_night,
)
from embedding_pipeline_tests.components.test_decide import lease

ORDER = [f"p{number:02}" for number in range(20)]


def night(*columns: ColumnFacts, **facts: object) -> NightFacts:
    return replace(NightFacts(columns, ORDER, 1000), **facts)  # type: ignore[arg-type]


def column(name: str = "e", **pending: int) -> ColumnFacts:
    return ColumnFacts(name, pending)


def test_what_is_pending_is_embedded_first() -> None:
    step = decide_night(night(column(p03=5)))
    assert (step.what, [request.partitions for request in step.requests]) == ("embed", [("p03",)])
    assert "5 rows pending" in step.reason


def test_with_nothing_pending_the_checks_come_at_once() -> None:
    step = decide_night(night(column(), column("f")))
    assert (step.what, step.requests) == ("check", [])
    assert step.reason == "e: nothing pending; f: nothing pending"


def test_the_nights_own_runs_are_waited_for() -> None:
    assert decide_night(night(column(p03=5), unfinished=2)).what == "wait"


def test_rows_that_are_left_after_a_round_get_another() -> None:
    assert decide_night(night(column(p03=5), rounds=3)).what == "embed"
    assert decide_night(night(column(p03=5), rounds=MOST_ROUNDS)).what == "check"


def test_a_failed_round_still_leads_to_the_checks() -> None:
    step = decide_night(night(column(p03=5), rounds=2, failed=1))
    assert (step.what, step.reason) == ("check", "round 2 of embedding failed")


def test_a_paused_table_is_left_alone() -> None:
    step = decide_night(night(column(p03=5), paused="paused since Monday by anna"))
    assert (step.what, step.reason) == ("skip", "paused since Monday by anna")


def test_a_held_column_does_not_keep_the_others_from_their_night() -> None:
    held = replace(column("held", p01=1), held="the daily cost cap is reached")
    step = decide_night(night(held, column("free", p02=1)))
    assert [request.columns for request in step.requests] == [("free",)]
    step = decide_night(night(held, column("free")))
    assert step.what == "check"
    assert "held: the daily cost cap is reached (1 row pending)" in step.reason


def test_a_stopped_column_does_not_keep_the_table_from_its_checks() -> None:
    step = decide_night(night(ColumnFacts("e", {}, problem="another recipe")))
    assert (step.what, step.reason) == ("check", "e: stopped: another recipe")


def test_rows_that_somebody_elses_run_works_on_are_waited_for_but_not_for_ever() -> None:
    leased = ColumnFacts("e", {"p01": 5}, {"p01": lease("p01")})
    starting = ColumnFacts("e", {"p01": 5}, in_flight=[RunInFlight("r", frozenset(["p01"]), 5.0)])
    for busy in (leased, starting):
        assert decide_night(night(busy)).what == "wait"
        late = night(busy, age_seconds=MOST_WAITING_SECONDS)
        assert decide_night(late).what == "check"


def test_rows_that_back_off_after_failures_are_not_waited_for() -> None:
    waiting = lease("p01", state="released", failures=2, waiting=30)
    assert decide_night(night(ColumnFacts("e", {"p01": 5}, {"p01": waiting}))).what == "check"


def test_scattered_partitions_are_a_handful_of_runs_not_hundreds() -> None:
    many = [f"t{number:04}" for number in range(1000)]
    scattered = ColumnFacts("e", dict.fromkeys(many[::2], 1))
    step = decide_night(NightFacts([scattered], many, 100_000))
    assert [(r.partitions[0], r.partitions[-1]) for r in step.requests] == [("t0000", "t0998")]
    assert len(decide([scattered], many, 100_000).requests) == 500, "what the day's sensor asks"


@given(
    st.dictionaries(st.sampled_from(ORDER), st.integers(1, 900), min_size=1),
    st.integers(1, 1000),
)
def test_a_round_covers_all_that_is_pending_once_within_the_rows_of_a_run(
    pending: dict[str, int], most: int
) -> None:
    step = decide_night(NightFacts([ColumnFacts("e", pending)], ORDER, most))
    covered = [key for request in step.requests for key in request.partitions]
    assert sorted(covered) == sorted(pending)
    for request in step.requests:
        assert request.rows == sum(pending[key] for key in request.partitions)
        assert request.rows <= most or len(request.partitions) == 1
