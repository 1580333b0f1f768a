"""What a day has cost, provider by provider, kept by all processes together.

A run adds the most that a request can come to before it sends it, and takes back what it did not
come to. So two runs together cannot pass a cap, and what a killed run had in flight counts in
full until the day ends: it may have been paid for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import psycopg

from embedding_pipeline.store import sqlfiles

ALL = "*"
"""The name under which the sum of all providers is kept; no provider can be called so."""


@dataclass(frozen=True)
class Spending:
    """What today has cost so far, for one provider or for all."""

    usd: float
    """US dollars, requests in flight included at the most that they can come to."""
    stopped_cap: float | None = None
    """The cap at which a run stopped today."""
    stopped_at: datetime | None = None


@dataclass(frozen=True)
class DailyCaps:
    """What may be spent in a day, in US dollars; None: as much as it takes."""

    provider: str
    own: float | None
    """Of this provider."""
    all: float | None
    """Of all providers together."""
    zone: str
    """The time zone in which a day begins."""

    def caps(self) -> dict[str, float]:
        """The caps that there are, by the name under which the spending is kept."""
        given = {self.provider: self.own, ALL: self.all}
        return {name: cap for name, cap in given.items() if cap is not None}


def describe_cap(name: str, cap: float, usd: float, zone: str) -> str:
    """A reached cap in words."""
    whose = "of all providers" if name == ALL else f"of provider {name}"
    return (
        f"the daily cost cap {whose} is reached: ${usd:.4f} of ${cap:g} spent today, and the next "
        f"request might pass it; goes on after midnight ({zone}), or when the cap is raised"
    )


def cap_in_the_way(
    caps: DailyCaps, today: Mapping[str, Spending], usd: float
) -> tuple[str, float] | None:
    """The cap that so many more dollars might pass, with its name."""
    for name, cap in caps.caps().items():
        if today.get(name, Spending(0.0)).usd + usd > cap:
            return name, cap
    return None


def is_reached(cap: float, spending: Spending) -> bool:
    """Whether a cap is used up, or a run has stopped at it today."""
    stopped = spending.stopped_cap is not None and cap <= spending.stopped_cap
    return stopped or spending.usd >= cap


def reached(caps: DailyCaps, today: Mapping[str, Spending]) -> str | None:
    """Why nothing more can be sent today, in words; None while something can.

    A cap at which a run has stopped stays reached, though a cheaper request might still fit:
    else one run after another would be started for it. Raising the cap opens it again.
    """
    for name, cap in caps.caps().items():
        known = today.get(name, Spending(0.0))
        if is_reached(cap, known):
            return describe_cap(name, cap, known.usd, caps.zone)
    return None


def spending_today(connection: "psycopg.Connection[Any]", zone: str) -> dict[str, Spending]:
    """What today has cost, by provider, and for `ALL`."""
    rows = connection.execute(sqlfiles.query("brakes/today"), [zone]).fetchall()
    return {row[0]: Spending(*row[1:]) for row in rows}


async def reserve(
    connection: "psycopg.AsyncConnection[Any]", caps: DailyCaps, usd: float
) -> date | None:
    """Add to today's spending unless that would pass a cap; the day, or None when it would.

    Two rows in one transaction, always in the same order: whoever waits sees what the other
    added.
    """
    rows: list[tuple[date, str]] = []
    async with connection.transaction():
        cursor = await connection.execute(
            sqlfiles.query("brakes/reserve"), [caps.zone, usd, caps.provider, caps.all, caps.own]
        )
        rows = await cursor.fetchall()
        if len(rows) < len((ALL, caps.provider)):
            raise psycopg.Rollback
    return rows[0][0] if len(rows) == len((ALL, caps.provider)) else None


async def give_back(
    connection: "psycopg.AsyncConnection[Any]", provider: str, day: date, usd: float
) -> None:
    """Take back what requests of that day did not come to."""
    await connection.execute(sqlfiles.query("brakes/give_back"), [day, provider, usd])


async def note_stopped(
    connection: "psycopg.AsyncConnection[Any]", caps: DailyCaps, usd: float
) -> str | None:
    """Remember at which cap a request of so many dollars stopped a run; the cap in words.

    None when it would fit by now.
    """
    cursor = await connection.execute(sqlfiles.query("brakes/today"), [caps.zone])
    today = {row[0]: Spending(*row[1:]) for row in await cursor.fetchall()}
    found = cap_in_the_way(caps, today, usd)
    if found is None:
        return None
    name, cap = found
    await connection.execute(sqlfiles.query("brakes/note_stopped"), [caps.zone, name, cap])
    return describe_cap(name, cap, today.get(name, Spending(0.0)).usd, caps.zone)
