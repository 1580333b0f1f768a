"""Users who write to the table while it is being embedded."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from embedding_pipeline.backfill import Counts
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.faults.runs import Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import assert_exact
from embedding_pipeline_tests.sessions import value
from embedding_pipeline_tests.tables import create_docs, embedding, spec

ROWS, EDITS, IN_A_TRANSACTION = 3_000, 2_000, 60
MOST_MS = 100.0


@contextmanager
def user_session(url: str) -> Iterator["psycopg.Connection[Any]"]:
    with connect(url) as session:
        session.execute("SET application_name = 'user'")
        yield session


def edit(url: str, seed: int) -> Counter[str]:
    """Random edits, deletes and inserts, one a transaction."""
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    with user_session(url) as session:
        for number in range(EDITS):
            key = rng.randrange(1, ROWS + 1)
            kind = rng.choices(
                ["edit", "blank", "clear", "move", "delete", "insert"], [10, 1, 1, 1, 3, 4]
            )[0]
            done[kind] += 1
            if kind == "delete":
                session.execute("DELETE FROM docs WHERE id = $1", [key])
            elif kind == "insert":
                session.execute(
                    "INSERT INTO docs (id, body, tenant) VALUES ($1, $2, 'b')"
                    " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                    [rng.choice([key, ROWS + number]), f"inserted {number}"],
                )
            elif kind == "move":
                session.execute("UPDATE docs SET tenant = 'c' WHERE id = $1", [key])
            else:
                body = {"edit": f"edited {number}", "blank": "  ", "clear": None}[kind]
                session.execute("UPDATE docs SET body = $2::text WHERE id = $1", [key, body])
    return done


def update_many(url: str, seed: int, ended: Callable[[], bool], requests: Callable[[], int]) -> int:
    """The user's job: 60 rows a transaction, in the order that is not ours."""
    rng = random.Random(seed)
    transactions = 0
    with user_session(url) as session:
        while not ended():
            first = rng.randrange(1, ROWS - IN_A_TRANSACTION)
            with session.transaction():
                for key in range(first + IN_A_TRANSACTION, first, -1):
                    session.execute(
                        "UPDATE docs SET body = body || '.' WHERE id = $1 AND body IS NOT NULL",
                        [key],
                    )
                # holds its rows while some batches are embedded and written
                seen, until = requests(), time.monotonic() + 0.2
                while requests() < seen + 4 and time.monotonic() < until and not ended():
                    time.sleep(0.005)
            transactions += 1
    return transactions


class Waits:
    """Looks all the time who waits for a lock that one of our sessions holds, and how long."""

    def __init__(self, url: str) -> None:
        self.longest_ms: dict[tuple[int, Any], float] = {}
        self.longest_gap_ms = 0.0
        """Between two looks: how long the machine let this very thread stand still."""
        self.looks = 0
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Waits":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def longest(self) -> float:
        return max(self.longest_ms.values(), default=0.0)

    def _watch(self) -> None:
        with connect(self._url) as session:
            session.execute("SET application_name = 'watcher'")
            looked = time.monotonic()
            while not self._stop.wait(0.005):
                rows = session.execute(
                    "SELECT l.pid, l.waitstart,"
                    " 1000 * extract(epoch FROM clock_timestamp() - l.waitstart)::float8"
                    " FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid"
                    " WHERE NOT l.granted AND l.waitstart IS NOT NULL"
                    " AND a.application_name = 'user' AND EXISTS (SELECT FROM pg_stat_activity"
                    " AS b WHERE b.pid = ANY(pg_blocking_pids(l.pid))"
                    " AND b.application_name = 'embedding_pipeline')"
                ).fetchall()
                for pid, since, milliseconds in rows:
                    self.longest_ms[pid, since] = milliseconds
                now = time.monotonic()
                self.longest_gap_ms = max(self.longest_gap_ms, 1000 * (now - looked))
                looked, self.looks = now, self.looks + 1


@pytest.mark.slow
def test_edits_during_a_backfill_end_in_the_right_state_and_never_wait_for_us(
    pipeline: Pipeline,
    connection: "psycopg.Connection[Any]",
    server: FaultServer,
    record_property: Any,
) -> None:
    """A backfill that locked its rows in reading order met a user's job that goes the other way:
    5 to 7 deadlocks in 7 seconds, the job being the one that lost, and a second's wait for others.
    Another tool locked nothing and wrote the vectors of texts that had been edited meanwhile."""
    create_docs(connection, ROWS)
    pipeline.declare(faulty=provider(server))
    column = pipeline.column(
        spec(embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)])
    )
    server.delay = 0.03
    total = Counts()
    with ThreadPoolExecutor(2) as pool, Waits(pipeline.url) as waits:
        edits: Future[Counter[str]] = pool.submit(edit, pipeline.url, 1)
        job = pool.submit(update_many, pipeline.url, 2, edits.done, lambda: server.count.requests)
        runs = 0
        while not edits.done() or runs == 0:
            total.add(pipeline.run(column, batch_size=32, concurrency=4).outcome.total)
            runs += 1
        done, transactions = edits.result(), job.result()
    server.delay = 0.0
    final = pipeline.run(column)

    assert final.remaining == {}
    assert final.outcome.stopped is None
    assert_exact(connection, column)
    assert done.total() == EDITS
    assert transactions > 0
    assert total.superseded > 0
    assert total.locked > 0
    deadlocks = value(
        connection, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert deadlocks == 0
    record_property("runs", runs)
    record_property("transactions", transactions)
    record_property("counts", str(total))
    record_property("waits", len(waits.longest_ms))
    record_property("longest_wait_ms", round(waits.longest, 1))
    record_property("longest_gap_ms", round(waits.longest_gap_ms, 1))
    assert waits.looks > 50
    # a machine that stands still holds everybody up, us and our locks too
    assert waits.longest <= MOST_MS + waits.longest_gap_ms
