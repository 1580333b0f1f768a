"""A connection that survives the server's restarts, for work that may be repeated."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg

from embedding_pipeline.store.connection import DatabaseUnreachableError, open_async

RECONNECT_SECONDS = 60.0
"""How long an operation is tried again before its error is raised."""

Result = TypeVar("Result")


class ReconnectingConnection:
    """A connection that is opened anew when the server goes away; used by one task at a time.

    Every operation given to it may be repeated: reads, compare-and-swap writes and upserts.
    Serialisation failures (40001) and deadlocks (40P01) are transient too.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def run(
        self, operation: Callable[["psycopg.AsyncConnection[Any]"], Awaitable[Result]]
    ) -> Result:
        """What the operation returns; its error once it has failed for `RECONNECT_SECONDS`."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        pause = 0.05
        while True:
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = await open_async(self._url)
                return await operation(self._connection)
            except (
                DatabaseUnreachableError,
                psycopg.OperationalError,
                psycopg.InterfaceError,
            ) as error:
                if time.monotonic() + pause > deadline or _is_final(error):
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)

    async def close(self) -> None:
        """Close the connection; a later operation would open another."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None


def _is_final(error: Exception) -> bool:
    """Operational errors that waiting does not mend."""
    return isinstance(error, psycopg.errors.DiskFull | psycopg.errors.ConfigurationLimitExceeded)
