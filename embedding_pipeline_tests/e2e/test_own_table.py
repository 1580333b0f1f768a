"""A table that is not shipped, from its first run to a changed text, with the sensors at work.

The tests of this module tell one story, in the order in which they stand: a user's table is
added, its text expression is edited, `dev` runs meanwhile, and the edit is accepted at last.
"""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from embedding_pipeline_tests.e2e.project import (
    LAYERS,
    MINILM,
    Done,
    Project,
    clone,
    descendants,
    still_at_work,
    temporary_folder,
    wait_until,
    write_table,
)

RIVERS = [
    ("danube", "Danube", "Flows from the Black Forest through Vienna to the Black Sea."),
    ("nile", "Nile", "Carries water from Lake Victoria through Egypt to the Mediterranean."),
    ("amazon", "Amazon", "Discharges more water into the Atlantic than any other river."),
    ("murray", "Murray", "Rises in the Australian Alps and irrigates the farms of Victoria."),
    ("parana", "Paraná", "Turns the turbines of Itaipú before it reaches the Río de la Plata."),
    ("thames", "Thames", "Passes Oxford and the Tower of London on its way to the North Sea."),
    ("volga", "Volga", "The longest river of Europe ends in the Caspian Sea."),
    ("mekong", "Mekong", "Feeds the rice fields of Vietnam from a delta with nine mouths."),
]
QUESTIONS = [
    {"query": "which stream waters the land of the pharaohs", "expected": ["nile"]},
    {"query": "hydroelectric dam between Brazil and Paraguay", "expected": ["parana"]},
    {"query": "water that runs through the capital of Austria", "expected": ["danube"]},
    {"query": "rice growing in southeast Asia", "expected": ["mekong"]},
]


@dataclass(frozen=True)
class Rivers:
    """The project with a fifth table, and what the first commands on it said."""

    project: Project
    folder: Path
    ran: Done
    evaluated: Done

    def write(self, text: str) -> None:
        """(Re)write the table's YAML."""
        write_table(
            self.folder,
            "rivers",
            id_column="code",
            text=text,
            embeddings=[MINILM, LAYERS],
            golden=QUESTIONS,
            partitions={"by": "hash", "buckets": 2},
        )


def make_rivers(project: Project, table: str = "rivers") -> None:
    """What a user does by hand, with the address that the command line prints."""
    address = project.run("database-url")
    assert address.code == 0, address.err
    with psycopg.connect(address.out.strip()) as connection:
        connection.execute(
            f"CREATE TABLE {table} (code text PRIMARY KEY, name text, course text NOT NULL)"
        )
        with connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO {table} VALUES (%s, %s, %s)", RIVERS)


@pytest.fixture(scope="module")
def rivers(project: Project) -> Iterator[Rivers]:
    folder = temporary_folder()
    mine = replace(
        project,
        environment=project.environment | {"EMBEDDING_PIPELINE_DEFS": str(folder)},
        _processes=[],
    )
    make_rivers(mine)
    try:
        rivers = Rivers(mine, folder, Done(-1, "", "", 0), Done(-1, "", "", 0))
        rivers.write("course")
        ran = mine.run("run", "--table", "rivers")
        evaluated = mine.run("evaluate", "--table", "rivers", "--json")
        yield replace(rivers, ran=ran, evaluated=evaluated)
    finally:
        mine.close()
        mine.sql("DROP TABLE rivers")
        mine.sql("DELETE FROM embedding_pipeline.embedding_column WHERE table_name = 'rivers'")


@pytest.mark.slow
def test_one_folder_makes_a_table(rivers: Rivers) -> None:
    done = rivers.ran
    assert done.code == 0, done.out + done.err
    assert rivers.project.sql(
        "SELECT count(*), count(embedding_384), count(embedding_1536) FROM rivers"
    ) == [(8, 8, 8)]
    cells = done.closing_table()
    assert list(cells) == ["rivers.embedding_384", "rivers.embedding_1536"]
    assert {row[-1] for row in cells.values()} == {"4/4"}
    assert rivers.evaluated.code == 0
    assert [
        (row["table"], row["column"], row["queries"], row["mrr_at_5"] > 0.6)
        for row in rivers.evaluated.json
    ] == [("rivers", "embedding_384", 4, True), ("rivers", "embedding_1536", 4, True)]


@pytest.mark.slow
def test_one_folder_inside_the_package_makes_a_table(project: Project, folder: Path) -> None:
    root = folder / "clone"
    clone(root)
    mine = replace(project, root=root, environment=project.environment | {"PYTHONPATH": str(root)})
    write_table(
        root / "embedding_pipeline/defs",
        "streams",
        id_column="code",
        text="name || ': ' || course",
        embeddings=[MINILM],
        golden=QUESTIONS,
    )
    make_rivers(mine, "streams")
    try:
        done = mine.run("run", "--table", "streams")
        assert done.code == 0, done.out + done.err
        assert done.closing_table()["streams.embedding_384"][1] == "8"
    finally:
        mine.sql("DROP TABLE streams")
        mine.sql("DELETE FROM embedding_pipeline.embedding_column WHERE table_name = 'streams'")


@pytest.fixture(scope="module")
def edited(rivers: Rivers) -> Rivers:
    """Somebody edits the text expression."""
    assert rivers.ran.code == 0
    rivers.write("name || ': ' || course")
    return rivers


def assert_explains(message: str) -> None:
    """Rows, cost and every way out."""
    assert "8 rows would be embedded again, about " in message
    assert "tokens, $0.0000" in message
    assert "put the YAML back" in message
    assert "migrate --accept-reembed" in message
    assert "reset rivers embedding_" in message
    assert "Traceback" not in message


@pytest.mark.slow
def test_an_edited_text_stops_its_columns_and_no_others(edited: Rivers) -> None:
    project = edited.project
    vectors = project.sql("SELECT code, xmin::text FROM rivers ORDER BY code")
    project.sql(
        "UPDATE phrases SET embedding_384 = NULL WHERE ctid = (SELECT min(ctid) FROM phrases)"
    )
    before = project.stats()
    done = project.run("run", "--table", "rivers", "--table", "phrases")
    assert done.code == 2
    assert_explains(done.err)
    for column in ("embedding_384", "embedding_1536"):
        assert f"rivers.{column}: the YAML asks for something else" in done.err
        assert project.pending("phrases", column) == 0
    assert project.stats()["inputs"] - before["inputs"] == 1
    assert project.sql("SELECT code, xmin::text FROM rivers ORDER BY code") == vectors
    backfill = project.run("backfill", "rivers", "embedding_384")
    assert backfill.code == 2
    assert_explains(backfill.err)


@dataclass(frozen=True)
class Dev:
    """A running `dev`."""

    process: int
    log: Path
    address: str


@pytest.fixture(scope="module")
def dev(edited: Rivers) -> Iterator[Dev]:
    log = edited.folder / "dev.log"
    process, address = edited.project.dev(log=log)
    yield Dev(process.pid, log, address)
    edited.project.close()


@pytest.mark.slow
def test_changed_rows_are_embedded_within_a_minute_without_a_hand(edited: Rivers, dev: Dev) -> None:
    project = edited.project
    tenant = "escuela-de-vela"
    text = "El barco vuelve a puerto cuando el viento pasa de los veinticinco nudos."
    before = project.stats()["inputs"]
    runs = project.runs()
    vectors = "SELECT id, md5(embedding_384::text), md5(embedding_1536::text) FROM knowledge_chunks"
    untouched = {row[0]: row[1:] for row in project.sql(vectors)}
    [(first,), (second,), (third,)] = project.sql(
        "UPDATE knowledge_chunks SET contenido = contenido || ' (revisado)' WHERE id IN"
        " (SELECT id FROM knowledge_chunks ORDER BY id LIMIT 3) RETURNING id"
    )
    project.sql(
        "DELETE FROM knowledge_chunks WHERE id IN"
        " (SELECT id FROM knowledge_chunks ORDER BY id DESC LIMIT 2)"
    )
    inserted = project.sql(
        "INSERT INTO knowledge_chunks (empresa_id, document_id, chunk_index, contenido)"
        " SELECT e, 'nuevo', 1, $1 || e FROM unnest(ARRAY[$2, (SELECT min(empresa_id) FROM"
        " knowledge_chunks)]) AS e RETURNING id",
        text,
        tenant,
    )
    started = time.monotonic()

    def complete() -> bool:
        columns = ("embedding_384", "embedding_1536")
        return not any(project.pending("knowledge_chunks", column) for column in columns)

    wait_until(complete, 60, dev.log.read_text)
    print(f"committed to embedded: {time.monotonic() - started:.1f} s")
    # five rows, two columns, each once; what the evaluation asks is known already
    assert project.stats()["inputs"] - before == 10
    changed = {first, second, third, *(key for (key,) in inserted)}
    now = {row[0]: row[1:] for row in project.sql(vectors)}
    assert {key for key in now if now[key] != untouched.get(key)} == changed
    assert (tenant,) in project.dagster(
        "SELECT partition FROM dynamic_partitions"
        " WHERE partitions_def_name = 'knowledge_chunks.empresa_id'"
    )

    def ended() -> bool:
        new = {run: status for run, status in project.runs().items() if run not in runs}
        return bool(new) and set(new.values()) == {"SUCCESS"}

    wait_until(ended, 30, project.runs)


def ticks(project: Project, sensor: str) -> list[dict[str, Any]]:
    """A sensor's ticks, newest first."""
    rows = project.dagster("SELECT tick_body FROM job_ticks ORDER BY id DESC LIMIT 200")
    bodies = [json.loads(body) for (body,) in rows]
    return [body for body in bodies if body["job_name"] == sensor]


@pytest.mark.slow
def test_the_sensor_of_the_edited_table_says_why_it_stands_still(edited: Rivers, dev: Dev) -> None:
    project = edited.project

    def skipped() -> Any:
        return next((t["skip_reason"] for t in ticks(project, "rivers_pending")), None)

    reason = wait_until(skipped, 30, dev.log.read_text)
    for column in ("embedding_384", "embedding_1536"):
        assert f"{column}: stopped: rivers.{column}: the YAML asks for something else" in reason
    assert_explains(reason)


@pytest.mark.slow
def test_a_run_beside_the_sensors_succeeds_and_pays_for_nothing_twice(
    edited: Rivers, dev: Dev
) -> None:
    project = edited.project
    before = project.stats()["inputs"]
    rows = project.sql(
        "UPDATE phrases SET english = english || '!' WHERE id IN"
        " (SELECT id FROM phrases ORDER BY id LIMIT 60) RETURNING 1"
    )
    done = project.run("run", "--table", "phrases")
    assert done.code == 0, done.out + done.err
    wait_until(
        lambda: (
            not any(
                project.pending("phrases", column) for column in ("embedding_384", "embedding_1536")
            )
        ),
        60,
        dev.log.read_text,
    )
    assert project.stats()["inputs"] - before == 2 * len(rows)


@pytest.mark.slow
def test_ctrl_c_ends_every_process_of_dev(edited: Rivers, dev: Dev) -> None:
    process = next(p for p in edited.project._processes if p.pid == dev.process)
    family = descendants(dev.process)
    assert len(family) >= 3  # webserver, daemon, code server
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=45) == 0
    assert still_at_work(family) == []
    log = dev.log.read_text()
    assert log.startswith(("not ready", "Dagster UI")), log
    for said in (
        f"Dagster UI   {dev.address}",
        "database     embedded Postgres",
        "sensors      on",
    ):
        assert said in log
    for noise in ("BetaWarning", "SupersessionWarning", "Traceback", "nothing pending"):
        assert noise not in log, log


@pytest.mark.slow
def test_an_accepted_edit_makes_its_rows_pending_and_run_embeds_them(edited: Rivers) -> None:
    project = edited.project
    before = project.stats()["inputs"]
    accepted = project.run("migrate", "--table", "rivers", "--accept-reembed")
    assert accepted.code == 0, accepted.err
    for column in ("embedding_384", "embedding_1536"):
        assert f"rivers.{column}: 8 rows would be embedded again, about " in accepted.out
    assert "tokens, $0.0000" in accepted.out
    assert {
        column: (row["embedded"], row["pending"])
        for column, row in project.coverage("rivers").items()
    } == {"embedding_384": (0, 8), "embedding_1536": (0, 8)}
    assert project.stats()["inputs"] == before
    done = project.run("run", "--table", "rivers")
    assert done.code == 0, done.out + done.err
    assert project.stats()["inputs"] - before == 16
    assert project.pending("rivers", "embedding_384") == 0
    assert project.pending("rivers", "embedding_1536") == 0
