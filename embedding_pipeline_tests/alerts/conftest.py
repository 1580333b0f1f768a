"""A world in which things break, and the channel that hears of it."""

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.alerts.receiver import Receiver
from embedding_pipeline_tests.alerts.world import World
from embedding_pipeline_tests.conftest import TEMPLATE, with_database
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import places_of
from embedding_pipeline_tests.project import set_variables
from embedding_pipeline_tests.rows import make_column
from embedding_pipeline_tests.tables import create_docs, spec

TABLE = spec(golden_set="golden_set.jsonl")
SECRET = "the-channels-PASSWORD"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(dimensions=4, model="test-model-4") as server:
        yield server


@dataclass(frozen=True)
class Template:
    """A complete world at rest: its database and the folder of its Dagster instance."""

    database: str
    folder: Path


@pytest.fixture(scope="session")
def template(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Made once: sixty rows in four tenants, embedded, indexed, evaluated; nothing is wrong."""
    folder = tmp_path_factory.mktemp("complete")
    database = f"complete_{uuid.uuid4().hex[:16]}"
    url = with_database(postgres_url, database)
    lines = [{"query": f"text number {n}", "expected": [n]} for n in range(1, 21)]
    (folder / "golden_set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with connect(postgres_url) as connection:
        connection.execute(f"CREATE DATABASE {database} TEMPLATE {TEMPLATE}".encode())
    with connect(url) as connection:
        create_docs(connection, 60)
        column = make_column(connection, TABLE)
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        FaultServer(dimensions=4, model="test-model-4") as server,
        Receiver() as receiver,
        dg.DagsterInstance.local_temp(str(folder)) as instance,
    ):
        _settings(monkeypatch, url, server, receiver)
        file = TableFile(TABLE, folder / "defs.yaml")
        world = World(file, column, url, receiver, server, instance)
        assert world.embed().success
        assert world.evaluate().success
        assert world.tick() == [], "nothing is wrong"
        assert world.incidents() == []
    load_settings.cache_clear()
    return Template(database, folder)


def _settings(
    monkeypatch: pytest.MonkeyPatch, url: str, server: FaultServer, receiver: Receiver
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "EMBEDDING_MODE"):
        monkeypatch.delenv(name, raising=False)
    set_variables(
        monkeypatch,
        DATABASE_URL=url,
        EMBEDDING_SERVICE_URL=server.tei_url,
        ALERT_URLS=receiver.url(SECRET),
        DAGSTER_UI_URL="http://dagster.example:3000/",
    )


@pytest.fixture
def world(
    template: Template,
    postgres_url: str,
    receiver: Receiver,
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """A world of the test's own, complete and at rest; afterwards no secret is found in it."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    with connect(postgres_url) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template.database}".encode())
    url = with_database(postgres_url, name)
    folder = tmp_path / "world"
    shutil.copytree(template.folder, folder)
    _settings(monkeypatch, url, server, receiver)
    with connect(url) as connection:
        column = bind_columns(connection, TABLE)[0]
    with dg.DagsterInstance.local_temp(str(folder)) as instance:
        file = TableFile(TABLE, folder / "defs.yaml")
        yield World(file, column, url, receiver, server, instance)
    with connect(url) as connection:
        assert places_of(connection, SECRET) == []
    load_settings.cache_clear()
    with connect(postgres_url) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
