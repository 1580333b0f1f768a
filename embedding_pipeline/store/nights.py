"""Nights: which tables the nightly schedule has started on and is not done with."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from embedding_pipeline.store import sqlfiles

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class Night:
    """One table's share of one tick of the schedule."""

    asset_name: str
    """The table, as Dagster names it."""
    scheduled_at: datetime
    age_seconds: float = 0.0
    """Since the schedule started it."""

    @property
    def name(self) -> str:
        """What its runs are tagged with."""
        return self.scheduled_at.isoformat(timespec="minutes")


def open_night(connection: Connection, environment: str, night: Night) -> None:
    """Note that a night has begun; one that is known already stays as it is."""
    connection.execute(
        sqlfiles.query("night/open"), [environment, night.asset_name, night.scheduled_at]
    )


def close_night(connection: Connection, environment: str, night: Night, outcome: str) -> None:
    """Note that a night is done with, and how it ended."""
    connection.execute(
        sqlfiles.query("night/close"), [environment, night.asset_name, night.scheduled_at, outcome]
    )


def open_nights(connection: Connection, environment: str) -> list[Night]:
    """The nights that are not done with, oldest first."""
    rows = connection.execute(sqlfiles.query("night/still_open"), [environment]).fetchall()
    return [Night(*row) for row in rows]
