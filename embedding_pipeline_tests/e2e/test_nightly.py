"""The nightly schedule in the real daemon: it fires at its minute and its runs succeed."""

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from embedding_pipeline_tests.e2e.project import (
    MINILM,
    Project,
    descendants,
    discard,
    make_project,
    still_at_work,
    temporary_folder,
    wait_until,
    write_table,
)

HELD = MINILM | {"column": "held_384"}
"""A column that is paused: the table's sensor never finds the table complete, and so never
evaluates it. What evaluates it here is the night."""


@pytest.fixture
def notes() -> Iterator[Project]:
    """Twelve rows in a project without sample tables."""
    project = make_project(temporary_folder())
    project.environment |= {
        "EMBEDDING_PIPELINE_DEFS": str(project.folder / "defs"),
        "DATABASE_URL": project.url,
        "DAGSTER_DATABASE_URL": project.dagster_url,
        "NIGHTLY_TIMEZONE": "Europe/Madrid",
    }
    try:
        soon = datetime.now(UTC) + timedelta(seconds=100)
        write_table(
            project.folder / "defs",
            "notes",
            text="body",
            embeddings=[MINILM, HELD],
            nightly={"at": f"{soon:%H:%M}", "timezone": "UTC"},
        )
        project.sql("CREATE TABLE notes (id bigint PRIMARY KEY, body text NOT NULL)")
        project.sql("INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 12) AS n")
        migrated = project.run("migrate", "--table", "notes")
        assert migrated.code == 0, migrated.err
        paused = project.run("pause", "notes", "held_384")
        assert paused.code == 0, paused.err
        yield project
    finally:
        discard(project)


@pytest.mark.slow
def test_the_night_comes_at_its_minute_and_is_seen_through(notes: Project) -> None:
    log = notes.folder / "dev.log"
    process, _ = notes.dev(log=log)

    def outcomes() -> list[tuple[object, ...]]:
        return notes.sql(
            "SELECT outcome FROM embedding_pipeline.night"
            " WHERE asset_name = 'notes' AND closed_at IS NOT NULL"
        )

    [(outcome,)] = wait_until(outcomes, 240, log.read_text)
    assert "embedding_384: nothing pending" in str(outcome)
    assert "held_384: paused since" in str(outcome)

    def of_the_night() -> list[tuple[object, ...]]:
        rows = notes.dagster(
            "SELECT r.status FROM runs r JOIN run_tags t ON t.run_id = r.run_id"
            " WHERE t.key = 'embedding_pipeline/nightly' AND t.value = 'checks'"
        )
        return rows if rows and rows[0][0] in ("SUCCESS", "FAILURE") else []

    assert wait_until(of_the_night, 90, log.read_text) == [("SUCCESS",)]
    assert notes.pending("notes", "embedding_384") == 0
    # the night's own work: the sensor leaves indexes to it while the table is not complete
    assert notes.sql(
        "SELECT indexname FROM pg_indexes WHERE tablename = 'notes' AND indexdef LIKE '%hnsw%'"
    ) == [("notes_embedding_384_hnsw",)]

    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert still_at_work(family) == []
    said = log.read_text()
    assert " UTC for notes\n" in said
    for noise in ("Traceback", "Stack Trace", "__ASSET_JOB"):
        assert noise not in said, said
