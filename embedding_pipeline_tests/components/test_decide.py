"""What a sensor tick decides, whatever the facts."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.components.decide import (
    QUALITY_EVERY_SECONDS,
    SHARED_RUN_ROWS,
    STARTING_SECONDS,
    ColumnFacts,
    Decision,
    EvaluationFacts,
    Request,
    RunInFlight,
    dead_leases,
    decide,
    due_for_evaluation,
    ranges,
)
from embedding_pipeline.store.lease import LeaseRow

ORDER = [f"p{number:02}" for number in range(10)]
RUNS = ["run-one", "run-two", None]


def lease(
    partition: str,
    *,
    run_id: str | None = "run-one",
    state: str = "live",
    failures: int = 0,
    waiting: float = 0.0,
) -> LeaseRow:
    """A lease that is `live`, `lapsed` or `released`."""
    return LeaseRow(
        partition,
        run_id,
        "host:1",
        1.0,
        live=state == "live",
        lapsed=state == "lapsed",
        failures=failures,
        not_before=None,
        waiting_seconds=waiting,
        last_error="HTTP 503" if failures else None,
    )


def facts(column: str = "e", **pending: int) -> ColumnFacts:
    return ColumnFacts(column, pending)


def run(*partitions: str, age: float = 10.0, alive: bool = False) -> RunInFlight:
    return RunInFlight("run-one", frozenset(partitions), age, alive)


def is_free(item: ColumnFacts, partition: str) -> bool:
    """Whether nobody works on a partition, or is about to, and it is not backing off."""
    held = item.leases.get(partition)
    if held is not None and (held.live or held.waiting_seconds > 0):
        return False
    for run in item.in_flight:
        coming = run.alive or run.age_seconds < STARTING_SECONDS
        been_here = held is not None and held.run_id == run.run_id
        if partition in run.partitions and coming and not been_here:
            return False
    return True


partitions = st.sampled_from(ORDER)
leases = st.builds(
    lambda partition, run_id, state, waiting: lease(
        partition,
        run_id=run_id,
        state=state,
        failures=1 if waiting else 0,
        waiting=0.0 if state == "live" else waiting,
    ),
    partitions,
    st.sampled_from(RUNS),
    st.sampled_from(["live", "lapsed", "released"]),
    st.sampled_from([0.0, 12.5]),
)
runs = st.builds(
    RunInFlight,
    st.sampled_from(["run-one", "run-two"]),
    st.frozensets(partitions),
    st.sampled_from([0.0, STARTING_SECONDS - 1, STARTING_SECONDS, 9000.0]),
    st.booleans(),
)


@st.composite
def columns(draw: st.DrawFn) -> list[ColumnFacts]:
    drawn = []
    for name in draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
        problem = draw(st.none() | st.none() | st.just("another recipe"))
        drawn.append(
            ColumnFacts(
                name,
                # what is pending is not known when there is a problem
                {}
                if problem
                else draw(
                    st.dictionaries(
                        partitions | st.just("new"),
                        st.integers(1, 40) | st.integers(1, 3 * SHARED_RUN_ROWS),
                    )
                ),
                {each.partition: each for each in draw(st.lists(leases, max_size=6))},
                draw(st.lists(runs, max_size=2)),
                problem,
            )
        )
    return drawn


def requested(decision: Decision) -> Counter[tuple[str, str]]:
    """How often each column's partition is asked for."""
    return Counter(
        (column, partition)
        for request in decision.requests
        for column in request.columns
        for partition in request.partitions
    )


def explained(decision: Decision, column: str) -> int:
    """How many of a column's partitions the reasons speak of."""
    return sum(
        int(found[1])
        for reason in decision.reasons
        if (found := re.match(rf"{column}: (\d+) partitions? ", reason))
    )


def rows(item: ColumnFacts, request: Request) -> int:
    return sum(item.pending[partition] for partition in request.partitions)


class TestDecide:
    """`decide`"""

    @given(columns(), st.integers(1, 2000))
    def test_exactly_what_is_pending_and_free_is_requested_once(
        self, items: list[ColumnFacts], most: int
    ) -> None:
        expected = Counter(
            (item.column, partition)
            for item in items
            for partition in item.pending
            if partition in ORDER and is_free(item, partition)
        )
        assert requested(decide(items, ORDER, most)) == expected

    @given(columns(), st.integers(1, 2000))
    def test_ranges_are_contiguous_and_bounded(self, items: list[ColumnFacts], most: int) -> None:
        by_name = {item.column: item for item in items}
        for request in decide(items, ORDER, most).requests:
            start = ORDER.index(request.partitions[0])
            assert list(request.partitions) == ORDER[start : start + len(request.partitions)]
            assert len(set(request.columns)) == len(request.columns) > 0
            counts = [rows(by_name[column], request) for column in request.columns]
            assert request.rows == max(counts)
            assert request.rows <= most or len(request.partitions) == 1
            if len(request.columns) > 1:
                assert request.rows <= SHARED_RUN_ROWS

    @given(columns(), st.integers(1, 2000))
    def test_every_pending_partition_that_is_not_requested_is_explained(
        self, items: list[ColumnFacts], most: int
    ) -> None:
        decision = decide(items, ORDER, most)
        asked = requested(decision)
        for item in items:
            left = [key for key in item.pending if not asked[item.column, key]]
            assert explained(decision, item.column) == len(left)

    @given(columns(), st.integers(1, 2000))
    def test_a_problem_stops_its_own_column_only(self, items: list[ColumnFacts], most: int) -> None:
        sound = [item for item in items if item.problem is None]
        decision = decide(items, ORDER, most)
        assert requested(decision) == requested(decide(sound, ORDER, most))
        for item in items:
            if item.problem:
                assert f"{item.column}: stopped: {item.problem}" in decision.reasons

    @given(columns(), st.integers(1, 2000))
    def test_nothing_pending_is_said_of_columns_without_pending_rows_and_of_no_others(
        self, items: list[ColumnFacts], most: int
    ) -> None:
        """A failed query must never read as "nothing pending"."""
        reasons = decide(items, ORDER, most).reasons
        said = {reason.partition(":")[0] for reason in reasons if "nothing pending" in reason}
        assert said == {item.column for item in items if not item.pending and not item.problem}

    @given(columns(), st.integers(1, 2000))
    def test_no_silence(self, items: list[ColumnFacts], most: int) -> None:
        """Of each column a tick says something: a request or a reason."""
        decision = decide(items, ORDER, most)
        spoken = {column for column, _ in requested(decision)}
        spoken |= {reason.partition(":")[0] for reason in decision.reasons}
        assert spoken == {item.column for item in items}

    def test_neighbours_become_one_run_in_dagsters_order(self) -> None:
        """Dynamic partitions keep the order in which they were made, which is not the alphabet's;
        a range whose start lies after its end is an empty run that succeeds."""
        decision = decide([facts(a=1, b=2, c=3, e=4)], ["c", "a", "b", "d", "e"], 100)
        assert decision.requests == [
            Request(("e",), ("c", "a", "b"), 6),
            Request(("e",), ("e",), 4),
        ]

    def test_runs_are_capped_in_rows(self) -> None:
        decision = decide([facts(p00=60, p01=40, p02=1, p03=500, p04=1)], ORDER, 100)
        assert [request.partitions for request in decision.requests] == [
            ("p00", "p01"),
            ("p02",),
            ("p03",),
            ("p04",),
        ]

    def test_columns_share_a_run_where_their_few_rows_lie_in_the_same_partitions(self) -> None:
        few, many = SHARED_RUN_ROWS, SHARED_RUN_ROWS + 1
        shared = [facts("a", p00=few, p05=1), facts("b", p00=3, p06=1)]
        assert decide(shared, ORDER, 10_000).requests == [
            Request(("a", "b"), ("p00",), few),
            Request(("a",), ("p05",), 1),
            Request(("b",), ("p06",), 1),
        ]
        apart = [facts("a", p00=many), facts("b", p00=3), facts("c", p00=many)]
        assert sorted(request.columns for request in decide(apart, ORDER, 10_000).requests) == [
            ("a",),
            ("b",),
            ("c",),
        ]

    def test_a_live_lease_is_waited_for(self) -> None:
        held = ColumnFacts("e", {"p00": 1, "p01": 1}, {"p00": lease("p00", run_id="abcdefghij")})
        decision = decide([held], ORDER, 100)
        assert decision.requests == [Request(("e",), ("p01",), 1)]
        assert decision.reasons == ["e: 1 partition in flight in run abcdefgh"]

    def test_leases_outside_dagster_are_counted_together(self) -> None:
        held = {key: lease(key, run_id=None) for key in ("p00", "p01", "p02")}
        decision = decide([ColumnFacts("e", dict.fromkeys(held, 1), held)], ORDER, 100)
        assert decision == Decision([], ["e: 3 partitions in flight outside Dagster"])

    @pytest.mark.parametrize("state", ["lapsed", "released"])
    def test_a_lease_that_is_no_longer_held_stands_in_nobodys_way(self, state: str) -> None:
        left = ColumnFacts("e", {"p00": 1}, {"p00": lease("p00", state=state)})
        assert decide([left], ORDER, 100) == Decision([Request(("e",), ("p00",), 1)], [])

    def test_a_run_that_was_asked_for_is_given_time_to_start(self) -> None:
        run = RunInFlight("abcdefghij", frozenset(["p00"]), STARTING_SECONDS - 1)
        starting = ColumnFacts("e", {"p00": 1}, in_flight=[run])
        assert decide([starting], ORDER, 100) == Decision(
            [], ["e: 1 partition in flight in run abcdefgh"]
        )
        late = replace(starting, in_flight=[replace(run, age_seconds=STARTING_SECONDS)])
        assert len(decide([late], ORDER, 100).requests) == 1
        alive = replace(starting, in_flight=[replace(run, age_seconds=9000.0, alive=True)])
        assert not decide([alive], ORDER, 100).requests

    def test_a_run_that_has_been_through_a_partition_does_not_hold_it(self) -> None:
        """Its rows are newer than the run's last look; the run may go on elsewhere for an hour."""
        run = RunInFlight("run-one", frozenset(["p00", "p01"]), 10.0, alive=True)
        facts = ColumnFacts(
            "e",
            {"p00": 1, "p01": 1},
            {"p00": lease("p00", state="released"), "p01": lease("p01")},
            [run],
        )
        assert decide([facts], ORDER, 100).requests == [Request(("e",), ("p00",), 1)]

    def test_back_off_says_when_and_why(self) -> None:
        waiting = ColumnFacts(
            "e",
            {"p00": 1, "p01": 1},
            {
                "p00": lease("p00", state="released", failures=3, waiting=42.4),
                "p01": lease("p01", state="released", failures=1, waiting=99.0),
            },
        )
        assert decide([waiting], ORDER, 100) == Decision(
            [],
            [
                "e: 2 partitions backing off after 3 failures, next try in 42 s; "
                "last error: HTTP 503"
            ],
        )

    def test_a_partition_that_dagster_does_not_know_is_named(self) -> None:
        assert decide([facts(new=1)], ORDER, 100) == Decision(
            [], ["e: 1 partition that Dagster does not know: new"]
        )

    def test_a_tick_over_very_many_partitions_is_quick(self) -> None:
        order = [str(number) for number in range(20_000)]
        decision = decide([ColumnFacts("e", dict.fromkeys(order, 1))], order, 100)
        assert len(decision.requests) == 200


@given(
    st.dictionaries(partitions | st.just("unknown"), st.integers(1, 50)),
    st.permutations(ORDER),
    st.integers(1, 60),
)
def test_ranges_cover_the_known_partitions_in_order(
    pending: dict[str, int], order: Sequence[str], most: int
) -> None:
    found = [key for request in ranges("e", pending, order, most) for key in request.partitions]
    assert found == [key for key in order if key in pending]


def test_ranges_are_as_few_as_they_can_be() -> None:
    """Two runs side by side are two only because together they would be too many rows."""
    pending = dict(zip(ORDER, [30, 30, 30, 50, 60, 10, 10, 10, 10, 90], strict=True))
    found = [request.rows for request in ranges("e", pending, ORDER, 100)]
    assert found == [90, 50, 100, 90]


def test_dead_leases_are_those_that_lapsed() -> None:
    item = ColumnFacts(
        "e",
        {},
        {
            "b": lease("b", state="lapsed"),
            "a": lease("a", state="lapsed"),
            "c": lease("c"),
            "d": lease("d", state="released"),
        },
    )
    assert [partition for partition, _ in dead_leases(item)] == ["a", "b"]


NEVER = EvaluationFacts(changed=True)
"""Written, and never evaluated."""


@pytest.mark.parametrize(
    ("known", "asked", "wanted"),
    [
        # the first evaluation comes at once
        (NEVER, None, True),
        # not when nothing was written since
        (EvaluationFacts(changed=False), None, False),
        (EvaluationFacts(changed=False, since_evaluated=QUALITY_EVERY_SECONDS), None, False),
        # later ones at most every ten minutes
        (EvaluationFacts(changed=True, since_evaluated=0.0), None, False),
        (EvaluationFacts(changed=True, since_evaluated=QUALITY_EVERY_SECONDS - 1), None, False),
        (EvaluationFacts(changed=True, since_evaluated=QUALITY_EVERY_SECONDS), None, True),
        # one that was asked for and has not finished, or failed, counts too
        (NEVER, 0.0, False),
        (NEVER, QUALITY_EVERY_SECONDS - 1, False),
        (NEVER, QUALITY_EVERY_SECONDS, True),
    ],
)
def test_when_a_complete_column_is_evaluated(
    known: EvaluationFacts, asked: float | None, wanted: bool
) -> None:
    assert due_for_evaluation([facts()], {"e": known}, asked) == ["e"] * wanted


@pytest.mark.parametrize(
    ("other", "pending_for", "due"),
    [
        # a column that is being filled, or will be in a moment, is waited for …
        (replace(facts("b", p01=1), leases={"p01": lease("p01")}), 5.0, []),
        (replace(facts("b", p01=1), in_flight=[run("p01", age=1.0)]), 5.0, []),
        (replace(facts("b", p01=1), in_flight=[run("p01", age=9e9, alive=True)]), 5.0, []),
        # … for ten minutes
        (
            replace(facts("b", p01=1), leases={"p01": lease("p01")}),
            QUALITY_EVERY_SECONDS,
            ["a"],
        ),
        # one that stands still holds nobody up
        (facts("b", p01=1), 5.0, ["a"]),
        (replace(facts("b", p01=1), in_flight=[run("p01", age=9e9)]), 5.0, ["a"]),
        (
            replace(facts("b", p01=1), leases={"p01": lease("p01", state="released", waiting=9.0)}),
            5.0,
            ["a"],
        ),
        (replace(facts("b"), problem="another model"), None, ["a"]),
        (replace(facts("b", p01=1), held="paused"), 5.0, ["a"]),
        # nor is a paused column evaluated, though it is complete
        (replace(facts("b"), held="paused"), None, ["a"]),
        # both are complete: one evaluation compares them
        (facts("b"), None, ["a", "b"]),
    ],
)
def test_a_complete_column_does_not_wait_for_one_that_stands_still(
    other: ColumnFacts, pending_for: float | None, due: list[str]
) -> None:
    known = {"a": NEVER, "b": replace(NEVER, pending_for=pending_for)}
    assert due_for_evaluation([facts("a"), other], known, None) == due


def test_what_was_not_written_is_not_evaluated_with_its_neighbour() -> None:
    known = {"a": NEVER, "b": EvaluationFacts(changed=False, since_evaluated=9e9)}
    assert due_for_evaluation([facts("a"), facts("b")], known, None) == ["a"]


def test_a_column_that_is_not_registered_is_not_evaluated() -> None:
    assert due_for_evaluation([facts("a")], {}, None) == []


# ---- brakes -----------------------------------------------------------------------------------


def test_a_brake_lets_nothing_start_and_is_named_with_what_waits() -> None:
    held = replace(facts("held", p01=1200, p02=34), held="paused since Monday by anna")
    decision = decide([held, facts("free", p01=1)], ORDER, 100_000)
    assert [request.columns for request in decision.requests] == [("free",)]
    assert decision.reasons == ["held: paused since Monday by anna (1,234 rows pending)"]


def test_a_brake_is_named_though_nothing_is_pending() -> None:
    decision = decide([replace(facts(), held="paused")], ORDER, 100_000)
    assert decision == Decision([], ["e: paused (0 rows pending)"])
