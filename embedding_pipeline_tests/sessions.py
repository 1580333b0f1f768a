"""Other sessions at the same database, for tests of what happens between them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg

from embedding_pipeline.store.connection import connect

Connection = psycopg.Connection[Any]


@contextmanager
def open_transaction(url: str, *statements: str) -> Iterator[Connection]:
    """A session that has executed something and left its transaction open; rolled back at exit."""
    with connect(url) as session:
        session.execute("BEGIN")
        for statement in statements:
            session.execute(statement)
        try:
            yield session
        finally:
            if not session.closed:
                session.rollback()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition that another session brings about; fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for: {what}"
        time.sleep(0.01)


def value(connection: Connection, query: str, parameters: list[Any] | None = None) -> Any:
    """The first value of a query's first row."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def as_role(url: str, role: str) -> str:
    """The same database's address for another role (the embedded server trusts all)."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{role}@{host}"))
