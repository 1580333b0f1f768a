"""A home of its own for each test that needs one, and one shared model and model server."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_pipeline.local import in_use, model_server, postgres
from embedding_pipeline.local.minilm import MiniLM


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    """A folder outside pytest's own, whose permissions every pytest start sets back to 0700."""
    home = Path(tempfile.mkdtemp(prefix="embedding_pipeline_test_")).resolve()
    try:
        yield home
    finally:
        for service in (postgres, model_server):
            in_use.release(home / service.__name__.rsplit(".", 1)[1])
        postgres.stop_postgres(home)
        model_server.stop_model_server(home)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder for embedded servers, which are stopped after the test."""
    with _home() as home:
        yield home


@pytest.fixture(scope="module")
def shared_home() -> Iterator[Path]:
    """A folder whose server several tests look at, and none harms."""
    with _home() as home:
        yield home


@pytest.fixture(scope="session")
def model() -> MiniLM:
    """The model, loaded once for all tests."""
    return MiniLM()


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """A running model server that the tests of its dialects share."""
    with _home() as home:
        yield model_server.ensure_model_server(home)
