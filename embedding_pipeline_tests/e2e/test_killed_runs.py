"""kill -9 in the middle: a command's run and one that the daemon launched.

What it looks like elsewhere: the killed run stays "started" for ever, its partition is blocked or
paid for again from the start. Here the lease lapses after 30 s, the run is shown as failed, and
only what was under way is embedded a second time.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embedding_pipeline_tests.e2e.project import (
    MINILM,
    Project,
    kill,
    on_another_database,
    wait_until,
    write_table,
)
from embedding_pipeline_tests.faults.server import FaultServer

ROWS, BATCH, CONCURRENCY = 1500, 16, 4
EMBEDDING = MINILM | {"batch_size": BATCH, "concurrency": CONCURRENCY}


@dataclass
class Slow:
    """A project on a database of its own, whose model server takes its time."""

    project: Project
    server: FaultServer
    facts: dict[str, int] = field(default_factory=dict)

    def add_rows(self, table: str) -> None:
        self.project.sql(
            f"INSERT INTO {table} SELECT n, 'letter ' || n || ' of {table}'"
            " FROM generate_series(1, $1) AS n",
            ROWS,
        )

    def asked(self, table: str) -> int:
        """Inputs sent for a table's rows, repeated ones included."""
        texts = self.server.count.texts
        return sum(count for text, count in texts.items() if text.endswith(f"of {table}"))

    def embedded(self, table: str) -> int:
        [(count,)] = self.project.sql(f"SELECT count(embedding_384) FROM {table}")
        return int(count)

    def holder(self, table: str) -> tuple[str, int] | None:
        """Run and pid that hold a table's lease."""
        rows = self.project.sql(
            "SELECT run_id, split_part(holder, ':', 2) FROM embedding_pipeline.lease"
            " WHERE table_name = $1 AND released_at IS NULL LIMIT 1",
            table,
        )
        return (rows[0][0], int(rows[0][1])) if rows else None

    def kill_in_the_middle(self, table: str) -> str:
        """kill -9 whoever embeds the table once some of it is written; returns the run."""
        wait_until(lambda: self.embedded(table) > ROWS / 5, 90)
        holder = self.holder(table)
        assert holder is not None
        run, pid = holder
        kill(pid)
        time.sleep(self.server.delay * 2)  # what it had sent arrives, what it had not never does
        self.facts[table] = self.asked(table) - self.embedded(table)
        assert self.embedded(table) < ROWS
        return run

    def assert_nothing_paid_twice(self, table: str) -> None:
        """Beyond what was asked for and not yet written when the run died."""
        assert self.embedded(table) == ROWS
        assert self.asked(table) == ROWS + self.facts[table]
        # four requests, as many batches waiting for the writer, and what it was writing
        assert self.facts[table] <= 3 * CONCURRENCY * BATCH
        assert max(self.server.count.texts.values()) <= 2


@pytest.fixture(scope="module")
def slow(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    folder = tmp_path_factory.mktemp("slow")
    mine = on_another_database(project, folder, f"killed_{time.time_ns()}")
    for table in ("letters", "postcards"):
        write_table(folder / "defs", table, text="body", embeddings=[EMBEDDING])
        mine.sql(f"CREATE TABLE {table} (id bigint PRIMARY KEY, body text NOT NULL)")
    with FaultServer(dimensions=384, model=str(MINILM["model"]), delay=0.15) as server:
        mine.environment |= {
            "EMBEDDING_PIPELINE_DEFS": str(folder / "defs"),
            "EMBEDDING_SERVICE_URL": server.tei_url,
        }
        migrated = mine.run("migrate", "--table", "letters", "--table", "postcards")
        assert migrated.code == 0, migrated.err
        try:
            yield Slow(mine, server)
        finally:
            mine.close()


@pytest.mark.slow
def test_after_kill_9_the_next_command_or_the_sensor_finishes(slow: Slow, tmp_path: Path) -> None:
    project = slow.project
    # a command, and the next command
    slow.add_rows("letters")
    project.start("embedding_pipeline", "backfill", "letters", "embedding_384")
    first = slow.kill_in_the_middle("letters")
    killed = time.monotonic()
    log = tmp_path / "backfill.log"
    again = project.start("embedding_pipeline", "backfill", "letters", "embedding_384", log=log)

    # a run that the daemon launched, and the sensor (while the lease of the first one lapses)
    dev_log = tmp_path / "dev.log"
    project.sql("UPDATE embedding_pipeline.lease SET holder = holder")  # the table is there
    slow.add_rows("postcards")
    project.dev(log=dev_log)
    second = slow.kill_in_the_middle("postcards")
    killed_too = time.monotonic()

    assert again.wait(timeout=killed + 120 - time.monotonic()) == 0, log.read_text()
    took = time.monotonic() - killed
    assert "1,500" not in log.read_text().splitlines()[-1]  # it went on, it did not begin anew
    slow.assert_nothing_paid_twice("letters")

    left = killed_too + 120 - time.monotonic()
    wait_until(lambda: slow.embedded("postcards") == ROWS, left, dev_log.read_text)
    print(f"finished after {took:.0f} s (command), {time.monotonic() - killed_too:.0f} s (sensor)")
    slow.assert_nothing_paid_twice("postcards")

    wait_until(lambda: "STARTED" not in project.runs().values(), 60, project.runs)
    runs = project.runs()
    assert runs.pop(first) == "FAILURE"
    assert runs.pop(second) == "FAILURE"
    assert set(runs.values()) == {"SUCCESS"}
