"""What `dev` says it has started."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.components import names
from embedding_pipeline.dev import make_partitions_known
from embedding_pipeline.dev_summary import summary
from embedding_pipeline.embedders import endpoints
from embedding_pipeline.settings import load_settings
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pauses import pause
from embedding_pipeline_tests.project import fresh_settings, set_variables, use_database
from embedding_pipeline_tests.rows import pretend_filled
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
SECRET = "VERYsecret"
DOCS = spec("docs", embeddings=[embedding(provider="far")])
NOTES = spec(
    "notes",
    embeddings=[embedding(provider="far")],
    nightly={"at": "03:30", "timezone": "Europe/Madrid"},
)


@pytest.fixture
def database_in_use(
    connection: Connection, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Two tables, whose provider is elsewhere."""
    providers = tmp_path / "providers.yaml"
    providers.write_text(
        "providers:\n  far:\n    dialect: tei\n"
        f"    address: https://somebody:{SECRET}@tei.example:8080\n"
    )
    monkeypatch.setattr(endpoints, "PROVIDERS_FILE", providers)
    with fresh_settings():
        use_database(monkeypatch, database)
        for table in (DOCS, NOTES):
            create_docs(connection, 8, table=table.table)
        migrate(connection, [DOCS, NOTES])
        yield


def said(sensors: bool = True) -> dict[str, list[str]]:
    """Part → what is said of it."""
    lines = summary([DOCS, NOTES], load_settings(), "http://127.0.0.1:3000", sensors)
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line[:12].strip(), []).append(line[13:])
    return found


@pytest.mark.usefixtures("database_in_use")
def test_every_part_says_where_it_is(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = said()
    assert found["Dagster UI"] == ["http://127.0.0.1:3000"]
    assert found["database"][0].startswith("DATABASE_URL")
    assert found["model server"] == ["https://tei.example:8080  (provider far)"]
    assert found["tables"] == ["docs, notes"]
    assert found["sensors"] == ["on: docs_pending, notes_pending, nightly_follow_up, alerts"]
    assert found["alerts"] == ["to nobody: ALERT_URLS is not set"]
    assert "paused" not in found
    usual, own = sorted(found["nightly"], key=lambda line: "Madrid" in line)
    assert usual.startswith("on: next 20")
    assert usual.endswith(" 02:00 UTC for docs")
    assert own.endswith(" 03:30 Europe/Madrid for notes")

    set_variables(monkeypatch, ALERT_URLS=f"json://somebody:{SECRET}@hooks.example/x")
    pause(connection, bind_columns(connection, DOCS)[0].facts, None, by="anna", reason="disk")
    found = said()
    assert found["alerts"][0].startswith("to ")
    assert "json" in found["alerts"][0]
    assert found["paused"][0].startswith("docs: paused since")
    assert found["paused"][0].endswith("by anna: disk")
    assert SECRET not in str(found)


@pytest.mark.usefixtures("database_in_use")
def test_without_sensors_it_says_so() -> None:
    found = said(sensors=False)
    assert found["sensors"] == ["off; switch them on under Automation in the UI"]
    assert found["nightly"] == ["off"]


@pytest.mark.usefixtures("database_in_use")
def test_partitions_can_be_picked_before_any_sensor_has_looked(connection: Connection) -> None:
    """Also of a table in which nothing is pending, with a new Dagster storage."""
    pretend_filled(connection, bind_columns(connection, NOTES)[0])
    gone = spec("gone")
    with dg.DagsterInstance.ephemeral() as instance:
        make_partitions_known(instance, [gone, DOCS, NOTES])
        for table in (DOCS, NOTES):
            assert names.known_partitions(instance, table) == ["(null)", "a", "b", "c"]
