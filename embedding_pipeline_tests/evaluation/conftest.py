"""Tables with vectors of known geometry, and an embedder that counts what it is asked."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from embedding_pipeline.store.connection import connect


@pytest.fixture
def connection(database: str) -> Iterator["psycopg.Connection[Any]"]:
    with connect(database) as opened:
        yield opened
