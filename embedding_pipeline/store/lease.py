"""Leases: who is working on a partition, known by a heartbeat rather than by a run's status.

Dagster leaves a killed run STARTED for ever, so a run's status alone would block its partition
for good; and two runs must never pay for one partition. A lease is a row that its holder renews
every `HEARTBEAT_SECONDS`; one that has not been renewed for `LAPSE_SECONDS` is anybody's. It
needs no session state, so it works behind a transaction pooler.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import psycopg

from embedding_pipeline.errors import LeaseError, PipelineError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.quarantine import LONGEST_ERROR, storable

HEARTBEAT_SECONDS = 5.0
LAPSE_SECONDS = 30.0
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 15, 3600


@dataclass(frozen=True)
class LeaseRow:
    """A lease as the database holds it."""

    partition: str
    run_id: str | None
    holder: str | None
    heartbeat_age: float
    """Seconds since the holder last renewed it."""
    live: bool
    """Held and renewed in time; false also for a released one."""
    lapsed: bool
    """Held by nobody any more: never released, not renewed in time."""
    failures: int
    not_before: datetime | None
    waiting_seconds: float
    """Seconds until the back-off after a failure ends; 0 when there is none."""
    last_error: str | None
    emptied_at: datetime | None = None
    """Whatever was pending in the partition at that time has been dealt with since."""


def read_leases(connection: "psycopg.Connection[Any]", column: Column) -> dict[str, LeaseRow]:
    """Every lease of a column, by partition."""
    rows = connection.execute(
        "SELECT partition_key, run_id, holder, extract(epoch FROM now() - heartbeat_at)::float8,"
        " released_at IS NULL AND heartbeat_at > now() - make_interval(secs => $4::float8),"
        " released_at IS NULL AND heartbeat_at <= now() - make_interval(secs => $4::float8),"
        " failures, not_before,"
        " greatest(extract(epoch FROM coalesce(not_before, now()) - now()), 0)::float8, last_error,"
        " emptied_at FROM embedding_pipeline.lease"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3",
        [*_names(column), LAPSE_SECONDS],
    ).fetchall()
    return {row[0]: LeaseRow(*row) for row in rows}


def release_lapsed(
    connection: "psycopg.Connection[Any]", column: Column, partitions: Sequence[str], error: str
) -> list[str]:
    """Take lapsed leases back after their runs died, counting a failure; returns those taken."""
    rows = connection.execute(
        "UPDATE embedding_pipeline.lease SET released_at = now(), failures = failures + 1,"
        " last_error = $6, not_before = now() + make_interval(secs => least($8::float8,"
        " $7::float8 * (2 ^ least(failures, 20))) )"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3"
        " AND partition_key = ANY($4) AND released_at IS NULL"
        " AND heartbeat_at <= now() - make_interval(secs => $5::float8) RETURNING partition_key",
        [
            *_names(column),
            list(partitions),
            LAPSE_SECONDS,
            error,
            BACKOFF_SECONDS,
            LONGEST_BACKOFF_SECONDS,
        ],
    ).fetchall()
    return [row[0] for row in rows]


class Lease:
    """Partitions of one column held by this process, with a heartbeat in a thread of its own.

    A thread, because a busy event loop must not look like a dead run. Use as a context manager
    and acquire inside it: entering starts the heartbeat, leaving releases, counting a failure
    (and its back-off) when an exception passes through.
    """

    def __init__(
        self, url: str, column: Column, partitions: Sequence[str], run_id: str | None
    ) -> None:
        self.column = column
        self.wanted = list(partitions)
        self.partitions: list[str] = []
        self.emptied = False
        """Set it when everything that was pending when the lease was taken is dealt with."""
        self.lost = threading.Event()
        self._url = url
        self._run_id = run_id
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewed = time.monotonic()
        """When the lease was certainly ours: the start of the last renewal that succeeded."""

    def acquire(self) -> dict[str, LeaseRow]:
        """Take what is free or lapsed; returns the partitions that others hold live."""
        if not self.partitions:
            self._renewed = time.monotonic()
        with connect(self._url) as connection:
            rows = connection.execute(
                "INSERT INTO embedding_pipeline.lease AS l (table_schema, table_name, column_name,"
                " partition_key, run_id, holder, acquired_at, heartbeat_at)"
                " SELECT $1, $2, $3, p, $5, $6, now(), now()"
                " FROM (SELECT DISTINCT unnest($4::text[]) AS p) AS wanted"
                " ORDER BY p ON CONFLICT (table_schema, table_name, column_name, partition_key)"
                " DO UPDATE SET run_id = excluded.run_id, holder = excluded.holder,"
                " acquired_at = now(), heartbeat_at = now(), released_at = NULL"
                " WHERE l.released_at IS NOT NULL"
                " OR l.heartbeat_at <= now() - make_interval(secs => $7::float8)"
                " RETURNING partition_key",
                [*_names(self.column), self.wanted, self._run_id, self._holder, LAPSE_SECONDS],
            ).fetchall()
            taken = {row[0] for row in rows}
            self.partitions += [key for key in self.wanted if key in taken]
            self.wanted = [key for key in self.wanted if key not in taken]
            if not self.wanted:
                return {}
            leases = read_leases(connection, self.column)
        return {key: leases[key] for key in self.wanted if key in leases}

    def acquire_waiting(self, report: Callable[[str], None]) -> dict[str, LeaseRow]:
        """Take the leases; wait out a holder that no longer beats, but never a live one.

        A killed run's lease looks live until it lapses. Whether its heartbeat moves tells the two
        apart: a live holder's does within two beats. Returns what live holders keep, at the
        latest when a lease that never moved would have lapsed.
        """
        held = self.acquire()
        if not held:
            return {}
        report(f"{self.column}: {describe_holders(held)}; looking whether it is alive")
        deadline = time.monotonic() + LAPSE_SECONDS + 2 * HEARTBEAT_SECONDS
        oldest = {key: lease.heartbeat_age for key, lease in held.items()}
        alive: set[str] = set()
        while set(held) - alive and time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 10)
            held = self.acquire()
            for key, lease in held.items():
                if lease.heartbeat_age < oldest.get(key, 0):
                    alive.add(key)
                oldest[key] = max(oldest.get(key, 0), lease.heartbeat_age)
        return held

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        said = None
        if kind is not None:
            said = storable(str(error) or kind.__name__, LONGEST_ERROR)
        try:
            with connect(self._url) as connection:
                self._release(connection, said)
        except (PipelineError, psycopg.Error):
            # it lapses by itself; what was done is done, and what passes through must be seen
            return

    def _release(self, connection: "psycopg.Connection[Any]", error: str | None) -> None:
        connection.execute(
            "UPDATE embedding_pipeline.lease SET released_at = now(), last_error = $5,"
            " emptied_at = CASE WHEN $8::boolean THEN acquired_at ELSE emptied_at END,"
            " failures = CASE WHEN $5::text IS NULL THEN 0 ELSE failures + 1 END,"
            " not_before = CASE WHEN $5::text IS NULL THEN NULL ELSE now() + make_interval("
            " secs => least($7::float8, $6::float8 * (2 ^ least(failures, 20)))) END"
            " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3 AND holder = $4",
            [
                *_names(self.column),
                self._holder,
                error,
                BACKOFF_SECONDS,
                LONGEST_BACKOFF_SECONDS,
                self.emptied,
            ],
        )

    def check(self) -> None:
        """LeaseError when the lease was lost: somebody else may be paying for these rows now."""
        if self.lost.is_set() or time.monotonic() - self._renewed > LAPSE_SECONDS:
            raise LeaseError(
                f"{self.column}: this run's lease lapsed (the machine slept, or the database was "
                "out of reach for too long) and may have been taken over; what was embedded is "
                "kept"
            )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            started, held = time.monotonic(), len(self.partitions)
            try:
                renewed = self._renew()
            except (PipelineError, psycopg.Error):
                continue  # `check` knows since when it has not been renewed
            if renewed < held:
                self.lost.set()
                return
            self._renewed = started

    def _renew(self) -> int:
        """Beat once; how many partitions are still ours."""
        with connect(self._url) as connection:
            return connection.execute(
                "UPDATE embedding_pipeline.lease SET heartbeat_at = now()"
                " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3"
                " AND holder = $4 AND released_at IS NULL",
                [*_names(self.column), self._holder],
            ).rowcount


def describe_holders(held: dict[str, LeaseRow]) -> str:
    """Who holds what, in a sentence."""
    first = next(iter(held.values()))
    what = f"partition {first.partition}" if len(held) == 1 else f"{len(held)} partitions"
    return (
        f"{what} held by run {first.run_id or 'outside Dagster'} ({first.holder}), "
        f"last heartbeat {first.heartbeat_age:.0f} s ago"
    )


def _names(column: Column) -> tuple[str, str, str]:
    return column.facts.schema, column.facts.name, column.embedding.column
