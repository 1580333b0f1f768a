"""Leases: exactly one holder, known by its heartbeat; a dead one's lapses."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import LeaseError
from embedding_pipeline.store import lease as lease_module
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.lease import Lease, describe_holders, read_leases, release_lapsed
from embedding_pipeline_tests.rows import make_column
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]
PARTITIONS = [str(number) for number in range(8)]


@pytest.fixture
def column(connection: Connection) -> Column:
    create_docs(connection, 4)
    return make_column(connection, spec(partitions={"by": "hash", "buckets": 8}))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that lapse after a second."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "LAPSE_SECONDS", 1.0)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def silent(_: str) -> None:
    pass


def fail_under_lease(database: str, column: Column) -> None:
    with Lease(database, column, ["0"], None) as lease:
        lease.acquire()
        raise RuntimeError("the provider said no \0 \ud83d")


def test_a_partition_has_one_holder(database: str, connection: Connection, column: Column) -> None:
    first = Lease(database, column, ["0", "1"], "run-1")
    second = Lease(database, column, ["1", "2", "2"], "run-2")

    assert first.acquire() == {}
    held = second.acquire()

    assert (first.partitions, second.partitions) == (["0", "1"], ["2", "2"])
    assert list(held) == ["1"]
    assert held["1"].run_id == "run-1"
    assert held["1"].live
    assert "run run-1" in describe_holders(held)
    assert all(
        lease.live and not lease.lapsed for lease in read_leases(connection, column).values()
    )


def test_a_released_lease_is_free_and_has_no_back_off(
    database: str, connection: Connection, column: Column
) -> None:
    with Lease(database, column, ["0"], "run-1") as first:
        first.acquire()
    assert not read_leases(connection, column)["0"].live

    second = Lease(database, column, ["0"], "run-2")
    assert second.acquire() == {}
    assert read_leases(connection, column)["0"].failures == 0


def test_failures_back_off_longer_each_time_until_one_succeeds(
    database: str, connection: Connection, column: Column
) -> None:
    waits = []
    for _ in range(3):
        with pytest.raises(RuntimeError):
            fail_under_lease(database, column)
        found = read_leases(connection, column)["0"]
        waits.append(found.waiting_seconds)
        assert found.last_error == "the provider said no � ?"
    base = lease_module.BACKOFF_SECONDS
    for wait, expected in zip(waits, (base, 2 * base, 4 * base), strict=True):
        assert expected - 5 < wait <= expected
    assert read_leases(connection, column)["0"].failures == 3

    with Lease(database, column, ["0"], None) as lease:
        lease.acquire()
    found = read_leases(connection, column)["0"]
    assert (found.failures, found.waiting_seconds, found.last_error) == (0, 0, None)


def test_the_back_off_has_a_longest(database: str, connection: Connection, column: Column) -> None:
    Lease(database, column, ["0"], None).acquire()
    connection.execute("UPDATE embedding_pipeline.lease SET failures = 1000")
    connection.execute("UPDATE embedding_pipeline.lease SET heartbeat_at = now() - interval '1 h'")

    assert release_lapsed(connection, column, ["0"], "died") == ["0"]

    wait = read_leases(connection, column)["0"].waiting_seconds
    assert 3590 < wait <= lease_module.LONGEST_BACKOFF_SECONDS


@pytest.mark.usefixtures("quick")
def test_a_beating_lease_does_not_lapse(
    database: str, connection: Connection, column: Column
) -> None:
    with Lease(database, column, ["0"], None) as lease:
        lease.acquire()
        time.sleep(1.5)
        lease.check()
        assert read_leases(connection, column)["0"].live
        assert release_lapsed(connection, column, ["0"], "died") == []


@pytest.mark.usefixtures("quick")
def test_a_silent_lease_lapses_and_is_taken_over(
    database: str, connection: Connection, column: Column
) -> None:
    silent_one = Lease(database, column, ["0"], "run-1")
    silent_one.acquire()
    wait_for(lambda: read_leases(connection, column)["0"].lapsed)
    with pytest.raises(LeaseError, match="lapsed"):
        silent_one.check()

    assert Lease(database, column, ["0"], "run-2").acquire() == {}
    assert read_leases(connection, column)["0"].run_id == "run-2"


@pytest.mark.usefixtures("quick")
def test_a_lease_that_was_taken_over_is_lost_and_not_released(
    database: str, connection: Connection, column: Column
) -> None:
    with Lease(database, column, ["0", "1"], "run-1") as lease:
        lease.acquire()
        connection.execute(
            "UPDATE embedding_pipeline.lease SET holder = 'another' WHERE partition_key = '1'"
        )
        wait_for(lease.lost.is_set)
        with pytest.raises(LeaseError, match="lapsed"):
            lease.check()
    leases = read_leases(connection, column)
    assert (leases["0"].live, leases["1"].live) == (False, True)


@pytest.mark.usefixtures("quick")
def test_a_lease_that_cannot_be_renewed_is_not_trusted_beyond_its_time(
    database: str, column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(database, column, ["0"], "run-1") as lease:
        lease.acquire()

        def unreachable() -> int:
            raise psycopg.OperationalError("the server is away")

        monkeypatch.setattr(lease, "_renew", unreachable)
        lease.check()
        time.sleep(1.3)
        with pytest.raises(LeaseError):
            lease.check()
        monkeypatch.undo()


@pytest.mark.usefixtures("quick")
def test_a_live_holder_is_not_waited_out(database: str, column: Column) -> None:
    with Lease(database, column, ["0"], "run-1") as first:
        first.acquire()
        second = Lease(database, column, ["0", "1"], "run-2")
        started = time.monotonic()
        held = second.acquire_waiting(silent)
        assert time.monotonic() - started < 1.0
    assert list(held) == ["0"]
    assert second.partitions == ["1"]


@pytest.mark.usefixtures("quick")
def test_what_is_held_while_waiting_for_a_dead_holder_does_not_lapse(
    database: str, column: Column, connection: Connection
) -> None:
    """Partitions that were free are ours from the start, and beat while we wait for the rest."""
    Lease(database, column, ["0"], "dead").acquire()
    with Lease(database, column, ["0", "1"], "run-2") as lease:
        assert lease.acquire_waiting(silent) == {}
        assert sorted(lease.partitions) == ["0", "1"]
        time.sleep(0.3)
        lease.check()
        assert all(found.live for found in read_leases(connection, column).values())


CONTENDER = """
import sys, time
from embedding_pipeline.store import catalogue, lease
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.tables import spec
lease.HEARTBEAT_SECONDS, lease.LAPSE_SECONDS = 0.1, 1.0
url, run, start = sys.argv[1], sys.argv[2], float(sys.argv[3])
with connect(url) as connection:
    table = spec(partitions={"by": "hash", "buckets": 8})
    column = catalogue.bind_columns(connection, table)[0]
with lease.Lease(url, column, [str(n) for n in range(8)], run) as mine:
    time.sleep(max(0, start - time.time()))
    mine.acquire()
    print(",".join(mine.partitions), flush=True)
    sys.stdin.readline()
    mine.check()
"""


def contender(database: str, run: str, start: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CONTENDER, database, run, str(start)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    return [key for key in process.stdout.readline().strip().split(",") if key]


@pytest.mark.usefixtures("quick")
def test_of_two_processes_exactly_one_wins_each_partition_and_a_killed_one_lapses(
    database: str, connection: Connection, column: Column
) -> None:
    start = time.time() + 4.0
    one, two = contender(database, "one", start), contender(database, "two", start)
    try:
        won = [first_line(one), first_line(two)]
        assert sorted(won[0] + won[1]) == PARTITIONS
        one.kill()
        one.wait()
        lapsed = set(won[0])
        wait_for(
            lambda: {k for k, v in read_leases(connection, column).items() if v.lapsed} == lapsed
        )
        third = Lease(database, column, PARTITIONS, "three")
        assert set(third.acquire()) == set(won[1])
        two.communicate("\n", timeout=20)
        assert two.returncode == 0
    finally:
        for process in (one, two):
            process.kill()
            process.wait()
