"""Which endpoint answers queries, since when, and what went wrong last: for whoever asks."""

import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import psycopg

from embedding_pipeline.embedders.fallback import FallbackState
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.settings import EmbeddingMode
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.quarantine import storable

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 30.0
"""How old the recorded error and latency may get while queries are asked. A switch from one
endpoint to the other is recorded at once."""
LONGEST_ERROR = 500


@dataclass(frozen=True)
class RecordedState:
    """What a process has recorded last of a table's queries."""

    mode: str
    active: str
    model: str
    column: str
    fell_back: bool
    since: datetime
    last_error: str | None
    last_error_at: datetime | None
    latency_ms: float | None
    process: str
    updated_at: datetime

    def __str__(self) -> str:
        text = f"{self.active} ({self.model}, column {self.column})"
        text += " stands in" if self.fell_back else " answers"
        text += f" since {self.since.isoformat(timespec='seconds')}"
        if self.latency_ms is not None:
            text += f", {self.latency_ms:.0f} ms"
        if self.last_error and self.last_error_at:
            when = self.last_error_at.isoformat(timespec="seconds")
            text += f"; last error {when}: {self.last_error.splitlines()[0]}"
        return text

    def to_json(self) -> dict[str, str | bool | float | None]:
        """The same for scripts; times as ISO 8601."""
        return {
            name: value.isoformat(timespec="milliseconds") if isinstance(value, datetime) else value
            for name, value in asdict(self).items()
        }


class StateRecorder:
    """Writes a `FallbackEmbedder`'s state, in a thread of its own, when there is news.

    It costs a query nothing, and a database that is away is no reason for one to fail.
    """

    def __init__(self, url: str, table: TableSpec, mode: EmbeddingMode) -> None:
        self._url, self._table, self._mode = url, table, mode
        self._lock = threading.Lock()
        self._latest: FallbackState | None = None
        self._writing = False
        self._written: tuple[str, datetime] | None = None
        self._written_at = 0.0

    def __call__(self, state: FallbackState) -> None:
        with self._lock:
            if (
                self._written == (state.active, state.since)
                and time.monotonic() - self._written_at < REFRESH_SECONDS
            ):
                return
            self._written = (state.active, state.since)
            self._written_at = time.monotonic()
            self._latest = state
            if self._writing:
                return
            self._writing = True
        threading.Thread(target=self._write, name="endpoint-state", daemon=True).start()

    def _write(self) -> None:
        while True:
            with self._lock:
                state, self._latest = self._latest, None
                if state is None:
                    self._writing = False
                    return
            try:
                with connect(self._url) as connection:
                    record(connection, self._table, self._mode, state)
            except (PipelineError, psycopg.Error) as error:
                logger.debug("the state of query embedding is not recorded: %s", error)


def record(
    connection: "psycopg.Connection[Any]",
    table: TableSpec,
    mode: EmbeddingMode,
    state: FallbackState,
) -> None:
    """Write a table's state; the latest writer wins."""
    error = None if state.last_error is None else storable(state.last_error, LONGEST_ERROR)
    connection.execute(
        "INSERT INTO embedding_pipeline.endpoint_state AS s (table_schema, table_name, mode,"
        " active, model, column_name, fell_back, since, last_error, last_error_at, latency_ms,"
        " process, updated_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, now())"
        " ON CONFLICT (table_schema, table_name) DO UPDATE SET mode = excluded.mode,"
        " active = excluded.active, model = excluded.model, column_name = excluded.column_name,"
        " fell_back = excluded.fell_back, since = excluded.since,"
        " last_error = excluded.last_error, last_error_at = excluded.last_error_at,"
        " latency_ms = excluded.latency_ms, process = excluded.process, updated_at = now()",
        [
            *_names(table),
            mode.value,
            state.active,
            state.model,
            state.column or "",
            state.fell_back,
            state.since,
            error,
            state.last_error_at,
            state.latency_ms,
            f"{socket.gethostname()}:{os.getpid()}",
        ],
    )


def read_state(connection: "psycopg.Connection[Any]", table: TableSpec) -> RecordedState | None:
    """What was recorded last; None before the first query."""
    row = connection.execute(
        "SELECT mode, active, model, column_name, fell_back, since, last_error, last_error_at,"
        " latency_ms, process, updated_at FROM embedding_pipeline.endpoint_state"
        " WHERE table_schema = $1 AND table_name = $2",
        list(_names(table)),
    ).fetchone()
    return RecordedState(*row) if row else None


def _names(table: TableSpec) -> tuple[str, str]:
    # as the YAML writes it: a process that only embeds queries has no need to look it up
    return table.qualified.schema or "", table.qualified.name
