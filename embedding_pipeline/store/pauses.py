"""Pauses: tables and columns that somebody wants left alone, with who, since when and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.catalogue import TableFacts

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class Pause:
    """A table or one of its columns that is paused."""

    column: str
    """Empty: the whole table."""
    by: str
    reason: str | None
    since: datetime

    @property
    def words(self) -> str:
        """Since when, by whom and why, for where it is clear what."""
        since = self.since.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return f"paused since {since} by {self.by}" + (f": {self.reason}" if self.reason else "")

    def __str__(self) -> str:
        return self.words if self.column else f"the whole table is {self.words}"


def pause(
    connection: Connection,
    table: TableFacts,
    column: str | None,
    *,
    by: str,
    reason: str | None = None,
) -> tuple[Pause, bool]:
    """Pause a column, or the whole table; the pause that now holds, and whether it is new.

    One that was there keeps who and since when; a new reason replaces the old one.
    """
    row = connection.execute(
        sqlfiles.query("brakes/pause"),
        [table.schema, table.name, column or "", by, reason],
    ).fetchone()
    assert row is not None
    return Pause(*row[:4]), bool(row[4])


def resume(connection: Connection, table: TableFacts, column: str | None) -> list[Pause]:
    """Lift a column's pause, or every pause of the table; those that were lifted.

    PipelineError when a column is asked for and the whole table is paused: lifting that would
    let its other columns go too.
    """
    if column is not None:
        whole = pause_of(pauses(connection, table), "")
        if whole is not None:
            raise PipelineError(
                f"{table.name}.{column}: {whole}; resume the whole table, then pause the columns "
                "that shall go on standing still"
            )
    rows = connection.execute(
        sqlfiles.query("brakes/resume"), [table.schema, table.name, column or ""]
    ).fetchall()
    return [Pause(*row) for row in rows]


def pauses(connection: Connection, table: TableFacts) -> list[Pause]:
    """Every pause of a table, that of the whole table first."""
    rows = connection.execute(
        sqlfiles.query("brakes/pauses"), [table.schema, table.name]
    ).fetchall()
    return [Pause(*row) for row in rows]


def pause_of(found: Sequence[Pause], column: str) -> Pause | None:
    """The pause that holds a column (or, with an empty name, the table) among a table's."""
    return next((each for each in found if each.column in ("", column)), None)
