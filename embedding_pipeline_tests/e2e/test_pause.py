"""Pausing in mid-run, from another terminal: a command's run, and one that the daemon launched.

What it looks like elsewhere: the only brake is to kill the run, which leaves it "started", loses
what was in flight, and the next tick of the sensor starts it again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from embedding_pipeline_tests.e2e.project import (
    MINILM,
    Project,
    discard,
    make_project,
    temporary_folder,
    wait_until,
    write_table,
)
from embedding_pipeline_tests.faults.server import FaultServer

ROWS, BATCH, CONCURRENCY = 1200, 16, 4
EMBEDDING = MINILM | {"batch_size": BATCH, "concurrency": CONCURRENCY}


@dataclass
class Letters:
    """A table of a project of its own, whose model server pauses it when it is told to."""

    project: Project
    server: FaultServer
    pause_at: int = -1
    """At this request of the server's count somebody pauses the table."""
    said: list[str] = field(default_factory=list)

    def rule(self, number: int, _: list[str]) -> None:
        if number == self.pause_at:
            done = self.project.run("pause", "letters", "--by", "anna", "--reason", "disk full")
            self.said.append(done.out + done.err)

    def embedded(self) -> int:
        [(count,)] = self.project.sql("SELECT count(embedding_384) FROM letters")
        return int(count)

    def paused_in_time(self) -> bool:
        """Nothing was sent but what had leave already when the pause was committed."""
        return self.server.count.requests <= self.pause_at + 1 + (CONCURRENCY - 1)

    def nothing_is_lost(self) -> bool:
        """Every input that was sent is a row that has its vector, and each was sent once."""
        texts = self.server.count.texts
        return self.embedded() == len(texts) and max(texts.values()) == 1

    def reason(self) -> str | None:
        """Why the table's sensor requested nothing, in its latest tick."""
        rows = self.project.dagster("SELECT tick_body FROM job_ticks ORDER BY id DESC LIMIT 60")
        ticks: list[dict[str, Any]] = [json.loads(body) for (body,) in rows]
        return next((t["skip_reason"] for t in ticks if t["job_name"] == "letters_pending"), None)


@pytest.fixture
def letters() -> Iterator[Letters]:
    project = make_project(temporary_folder())
    with FaultServer(dimensions=384, model=str(MINILM["model"]), delay=0.05) as server:
        project.environment |= {
            "EMBEDDING_PIPELINE_DEFS": str(project.folder / "defs"),
            "EMBEDDING_SERVICE_URL": server.tei_url,
            "DATABASE_URL": project.url,  # without sample rows
            "DAGSTER_DATABASE_URL": project.dagster_url,
        }
        try:
            write_table(project.folder / "defs", "letters", text="body", embeddings=[EMBEDDING])
            project.sql("CREATE TABLE letters (id bigint PRIMARY KEY, body text NOT NULL)")
            project.sql(
                "INSERT INTO letters SELECT n, 'letter ' || n FROM generate_series(1, $1) AS n",
                ROWS,
            )
            migrated = project.run("migrate", "--table", "letters")
            assert migrated.code == 0, migrated.err
            letters = Letters(project, server)
            server.rule = letters.rule
            yield letters
        finally:
            discard(project)


@pytest.mark.slow
def test_a_pause_stops_runs_within_one_batch_and_resume_goes_on(letters: Letters) -> None:
    project, server = letters.project, letters.server

    # a command in progress
    letters.pause_at = 10
    done = project.run("backfill", "letters", "embedding_384")
    assert done.code == 0, done.err
    assert "letters: paused since" in letters.said[0]
    assert letters.paused_in_time()
    assert letters.nothing_is_lost()
    left = ROWS - letters.embedded()
    assert f"{left:,} rows stay pending: the whole table is paused since" in done.out
    assert "by anna: disk full" in done.out
    assert set(project.runs().values()) == {"SUCCESS"}

    # commands that come afterwards say so, and a check that fails for it is no error
    asked = server.count.requests
    for arguments in (("backfill", "letters"), ("run", "--table", "letters")):
        done = project.run(*arguments)
        assert done.code == 0, done.out + done.err
        assert f"{left:,} rows stay pending: the whole table is paused since" in done.out
    assert server.count.requests == asked
    paused = project.coverage("letters")["embedding_384"]["paused"]
    assert (paused["by"], paused["reason"]) == ("anna", "disk full")

    # the sensor says so; resumed, it goes on; paused in mid-run it stops, and goes on again
    log = project.folder / "dev.log"
    project.dev(log=log)
    assert "paused       letters: paused since" in log.read_text()
    reason = str(wait_until(letters.reason, 60, log.read_text))
    assert "by anna: disk full" in reason
    assert f"({left:,} rows pending)" in reason
    assert server.count.requests == asked

    letters.pause_at = asked + 10
    assert project.run("resume", "letters").code == 0
    wait_until(lambda: len(letters.said) == 2, 90, log.read_text)
    wait_until(lambda: set(project.runs().values()) == {"SUCCESS"}, 60, project.runs)
    assert letters.paused_in_time()
    assert letters.nothing_is_lost()
    assert letters.embedded() < ROWS

    assert project.run("resume", "letters").code == 0
    wait_until(lambda: letters.embedded() == ROWS, 90, log.read_text)
    assert letters.nothing_is_lost()
    wait_until(lambda: set(project.runs().values()) == {"SUCCESS"}, 60, project.runs)
