"""Connections as every query here expects them.

They use raw cursors (`$1` parameters), because users' SQL expressions may contain `%`; no
prepared statements and no session state, because both are lost behind a transaction pooler.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.errors import PipelineError, SettingsError
from embedding_pipeline.settings import UNREADABLE_ADDRESS, is_readable_address, load_settings

PLANNER = sql.SQL("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
"""For transactions that count or read pending rows: right after a bulk fill the planner prefers
a sequential scan (0.8–1.4 s on 300,000 rows against 0.3 ms), and ANALYZE does not help."""

SESSION = sql.SQL("SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'")
"""What turns values into text must be the same in every session: partition keys depend on it."""


def database_url() -> str:
    """The connection string in use: DATABASE_URL, else that of the embedded server, started."""
    settings = load_settings()
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    from embedding_pipeline.local.postgres import ensure_postgres

    return ensure_postgres(settings.embedding_pipeline_home)


@contextmanager
def connect(url: str | None = None, **options: Any) -> Iterator["psycopg.Connection[Any]"]:
    """A connection in autocommit mode, closed at the end; PipelineError when it cannot be had."""
    try:
        connection = psycopg.connect(
            _readable(url or database_url()),
            autocommit=True,
            prepare_threshold=None,
            cursor_factory=psycopg.RawCursor,
            application_name="embedding_pipeline",
            connect_timeout=10,
            **options,
        )
    except psycopg.OperationalError as error:
        raise _unreachable(error) from None
    except psycopg.ProgrammingError:
        raise _unreadable() from None
    with connection:
        yield connection


@asynccontextmanager
async def connect_async(
    url: str | None = None, **options: Any
) -> AsyncIterator["psycopg.AsyncConnection[Any]"]:
    """The same as `connect`, for asyncio."""
    connection = await open_async(url, **options)
    async with connection:
        yield connection


async def open_async(url: str | None = None, **options: Any) -> "psycopg.AsyncConnection[Any]":
    """An open asyncio connection in autocommit mode; the caller closes it."""
    try:
        return await psycopg.AsyncConnection.connect(
            _readable(url or database_url()),
            autocommit=True,
            prepare_threshold=None,
            cursor_factory=psycopg.AsyncRawCursor,
            application_name="embedding_pipeline",
            connect_timeout=10,
            **options,
        )
    except psycopg.OperationalError as error:
        raise _unreachable(error) from None
    except psycopg.ProgrammingError:
        raise _unreadable() from None


def _readable(url: str) -> str:
    """The address, if libpq's errors about it would quote no part of a password."""
    if not is_readable_address(url):
        raise _unreadable()
    return url


def _unreadable() -> SettingsError:
    return SettingsError(f"DATABASE_URL {UNREADABLE_ADDRESS}")


class DatabaseUnreachableError(PipelineError):
    """No connection could be made; worth trying again."""


def _unreachable(error: psycopg.Error) -> DatabaseUnreachableError:
    # libpq's message names host and user but never the password
    return DatabaseUnreachableError(
        f"cannot connect to Postgres: {str(error).strip()}\n"
        "Check DATABASE_URL (unset it to use the embedded server)."
    )
