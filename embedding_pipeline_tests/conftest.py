"""Fixtures that many tests share: one real Postgres for the session, a fresh database per test."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import hypothesis
import psycopg
import pytest
from psycopg import sql

from embedding_pipeline import settings
from embedding_pipeline.local.postgres import ensure_postgres, stop_postgres
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.faults.server import FaultServer

# a loaded machine must not fail a test
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")

TEMPLATE = "template_with_pgvector"

Environment = Callable[..., None]
"""What the fixture `environment` gives: `environment(NAME="value")` sets variables."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Environment]:
    """Sets variables, in an environment that starts with none of ours and without a `.env`."""
    for name in [*settings.Settings.model_fields, "postgres_url"]:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(settings, "PROJECT_ROOT", tmp_path)

    def change(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings.load_settings.cache_clear()

    change()
    yield change
    settings.load_settings.cache_clear()


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A provider of 4-dimensional vectors by `test-model`; folders with other needs have theirs."""
    with FaultServer(dimensions=4) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """A Postgres server with pgvector, shared by every test process of this run.

    The embedded one in a temporary folder, or the one that TEST_DATABASE_URL names; there the
    role has to be a superuser.
    """
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        url = given
    else:
        home = _server_home()
        home.mkdir(parents=True, exist_ok=True)
        url = _embedded_server(home)
    with connect(url) as connection:
        # only one process makes the template; the lock ends with the connection
        connection.execute("SELECT pg_advisory_lock(7355608)")
        known = connection.execute("SELECT FROM pg_database WHERE datname = $1", [TEMPLATE])
        if known.fetchone() is None:
            connection.execute(f"CREATE DATABASE {TEMPLATE}")
            with connect(with_database(url, TEMPLATE)) as template:
                template.execute("CREATE EXTENSION vector")
    return url


def _server_home() -> Path:
    """A folder that all test processes of this run share.

    Not pytest's own: as root the server runs as another user, and the next pytest session closes
    pytest's folders to everybody else under it.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
    return Path(tempfile.gettempdir()) / f"embedding-pipeline-tests-{run}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the shared server and remove its data, once every worker is done."""
    worker = getattr(session.config, "workerinput", None)
    if worker is not None or "TEST_DATABASE_URL" in os.environ:
        return
    plugin = session.config.pluginmanager.get_plugin("dsession")
    run = getattr(getattr(plugin, "nodemanager", None), "testrunuid", None) or str(os.getpid())
    home = Path(tempfile.gettempdir()) / f"embedding-pipeline-tests-{run}"
    if home.exists():
        stop_postgres(home)
        shutil.rmtree(home, ignore_errors=True)


def _embedded_server(home: Path) -> str:
    url = ensure_postgres(home, linger=5)
    with connect(url) as connection:
        # these tests end their sessions, not the machine: nothing needs to reach the disk
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off")
        connection.execute("SELECT pg_reload_conf()")
    return url


def with_database(url: str, name: str) -> str:
    """The same server's address with another database in it."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _fresh(postgres_url: str, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:16]}"
    with connect(postgres_url) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    yield with_database(postgres_url, name)
    with connect(postgres_url) as connection:
        connection.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """The address of a fresh database with pgvector installed, dropped afterwards."""
    yield from _fresh(postgres_url, TEMPLATE)


@pytest.fixture
def twin_database(postgres_url: str) -> Iterator[str]:
    """A second fresh database with pgvector installed."""
    yield from _fresh(postgres_url, TEMPLATE)


@pytest.fixture
def bare_database(postgres_url: str) -> Iterator[str]:
    """The address of a fresh database without any extension."""
    yield from _fresh(postgres_url, "template0")


@pytest.fixture
def connection(database: str) -> Iterator["psycopg.Connection[Any]"]:
    """A connection to the test's database."""
    with connect(database) as connection:
        yield connection
