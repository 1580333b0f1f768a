"""Fixtures of the fault suite. Every test of it ends with a search for the secrets it used."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from embedding_pipeline.embedders import endpoints
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.faults.runs import (
    KEY,
    KEY_VARIABLE,
    PASSWORD,
    Pipeline,
    shorten_waiting,
)
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import places_of


def with_password(url: str) -> str:
    """The address with a password in it, which a server that trusts us does not ask for."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at or ":" in user:
        return url
    return urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{host}"))


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A provider of 8-dimensional vectors that wants the key."""
    with FaultServer(dimensions=8, model="test-model", api_key=KEY) as server:
        yield server


@pytest.fixture
def pipeline(
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Pipeline]:
    """The real core with providers of the test's own; afterwards no secret is found anywhere."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    shorten_waiting(monkeypatch.setattr)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(with_password(database), Path(folder) / "providers.yaml")
        # a server of the user's own may need its own password, which may be any word
        assert PASSWORD in pipeline.url or "TEST_DATABASE_URL" in os.environ
        monkeypatch.setattr(endpoints, "PROVIDERS_FILE", pipeline.providers_file)
        yield pipeline
    records = caplog.get_records("call")
    formatter = logging.Formatter()
    captured = capfd.readouterr()
    everything = "\n".join(
        [*map(formatter.format, records), captured.out, captured.err, *pipeline.shown]
    )
    for secret in (KEY, PASSWORD):
        assert secret not in everything
        with connect(database) as connection:
            assert places_of(connection, secret) == []


@pytest.fixture
def connection(pipeline: Pipeline) -> Iterator["psycopg.Connection[Any]"]:
    """A connection to the test's database."""
    with connect(pipeline.url) as connection:
        yield connection
