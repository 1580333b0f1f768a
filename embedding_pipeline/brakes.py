"""What holds a column back though rows are pending: a pause, or a daily cost cap that is reached.

Sensors, the schedule and commands ask `held_back` before they start anything. A run in progress
carries a `RunBrake`, which it asks before each page that it reads and each request that it sends.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import psycopg

from embedding_pipeline.settings import Settings, load_settings
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.pauses import Pause, pause_of, pauses
from embedding_pipeline.store.reconnecting import ReconnectingConnection
from embedding_pipeline.store.spending import (
    DailyCaps,
    give_back,
    note_stopped,
    reached,
    reserve,
    spending_today,
)

if TYPE_CHECKING:
    from embedding_pipeline.embedders.port import Endpoint


@dataclass(frozen=True)
class Held:
    """Why a column is left alone."""

    by: Literal["pause", "daily_cost_cap"]
    reason: str
    """For a person: since when, by whom, and what lets it go on."""

    def __str__(self) -> str:
        return self.reason


def daily_caps(
    embedding: EmbeddingSpec, settings: Settings, endpoints: "Mapping[str, Endpoint]"
) -> DailyCaps | None:
    """The daily caps that a column's requests count towards; None where they cost nothing."""
    endpoint = endpoints.get(embedding.provider)
    if endpoint is None or not endpoint.price_per_million_tokens.get(embedding.model):
        return None
    return DailyCaps(
        provider=endpoint.name,
        own=endpoint.daily_cost_cap,
        all=settings.embedding_daily_cost_cap,
        zone=settings.nightly_timezone,
    )


def paused(connection: "psycopg.Connection[Any]", column: Column) -> Pause | None:
    """The pause that holds a column: its own, or the whole table's."""
    return pause_of(pauses(connection, column.facts), column.embedding.column)


def held_back(
    connection: "psycopg.Connection[Any]",
    column: Column,
    settings: Settings | None = None,
    endpoints: "Mapping[str, Endpoint] | None" = None,
) -> Held | None:
    """Why a column's pending rows are not to be embedded now; None when they are."""
    found = paused(connection, column)
    if found is not None:
        return Held("pause", str(found))
    # numpy and what speaks to providers: loading the definitions must not wait for them
    from embedding_pipeline.embedders.endpoints import load_endpoints

    settings = settings or load_settings()
    caps = daily_caps(
        column.embedding, settings, load_endpoints(settings) if endpoints is None else endpoints
    )
    if caps is None or not caps.caps():
        return None
    reason = reached(caps, spending_today(connection, caps.zone))
    return Held("daily_cost_cap", reason) if reason else None


@dataclass(frozen=True)
class Reservation:
    """What a request may cost, counted as spent on this day until it is settled."""

    day: date | None = None
    usd: float = 0.0


class BrakedError(Exception):
    """A request must not be sent now."""

    def __init__(self, held: Held, *, may_ease: bool) -> None:
        super().__init__(held.reason)
        self.held = held
        self.may_ease = may_ease
        """Whether this run's own requests in flight may make room when they are settled."""


class Brake(Protocol):
    """What a run asks whether it may go on."""

    async def look(self) -> Held | None:
        """Why the run must not go on; None when it may."""
        ...

    async def reserve(self, usd: float) -> Reservation:
        """Count the most that a request can cost as spent; BrakedError when it must not be sent."""
        ...

    def settle(self, reservation: Reservation, usd: float) -> None:
        """That request has ended and has cost so much."""
        ...

    async def close(self) -> None:
        """Give back what is left over."""
        ...


class NoBrake:
    """For backfills that nobody can hold back."""

    async def look(self) -> Held | None:
        return None

    async def reserve(self, usd: float) -> Reservation:  # noqa: ARG002
        return Reservation()

    def settle(self, reservation: Reservation, usd: float) -> None:
        pass

    async def close(self) -> None:
        pass


class RunBrake:
    """The brake of one run: the database's word, asked over a connection of its own.

    One short query a request. What requests did not come to is given back with the next one.
    """

    def __init__(self, url: str, column: Column, caps: DailyCaps | None) -> None:
        self._column, self._caps = column, caps
        self._connection = ReconnectingConnection(url)
        self._turn = asyncio.Lock()
        self._left_over: dict[date, float] = {}
        self._in_flight = 0

    async def look(self) -> Held | None:
        async with self._turn:
            return await self._connection.run(self._paused)

    async def reserve(self, usd: float) -> Reservation:
        async with self._turn:
            held = await self._connection.run(self._paused)
            if held is not None:
                raise BrakedError(held, may_ease=False)
            caps = self._caps
            if caps is None or usd <= 0:
                return Reservation()
            while True:
                await self._give_back(caps)
                day = await self._connection.run(lambda c: reserve(c, caps, usd))
                if day is not None:
                    self._in_flight += 1
                    return Reservation(day, usd)
                if self._in_flight or self._left_over:
                    waiting = Held("daily_cost_cap", "a daily cost cap is nearly reached")
                    raise BrakedError(waiting, may_ease=True)
                words = await self._connection.run(lambda c: note_stopped(c, caps, usd))
                if words is not None:
                    raise BrakedError(Held("daily_cost_cap", words), may_ease=False)

    def settle(self, reservation: Reservation, usd: float) -> None:
        if reservation.day is not None:
            self._in_flight -= 1
            before = self._left_over.get(reservation.day, 0.0)
            self._left_over[reservation.day] = before + reservation.usd - usd

    async def close(self) -> None:
        async with self._turn:
            if self._caps is not None:
                await self._give_back(self._caps)
            await self._connection.close()

    async def _give_back(self, caps: DailyCaps) -> None:
        while self._left_over:
            await self._connection.run(partial(self._give_back_once, caps.provider))

    async def _give_back_once(
        self, provider: str, connection: "psycopg.AsyncConnection[Any]"
    ) -> None:
        if self._left_over:
            # forgotten first: lost, where the connection breaks, is better than given back twice
            await give_back(connection, provider, *self._left_over.popitem())

    async def _paused(self, connection: "psycopg.AsyncConnection[Any]") -> Held | None:
        facts = self._column.facts
        cursor = await connection.execute(
            sqlfiles.query("brakes/pauses"), [facts.schema, facts.name]
        )
        found = [Pause(*row) for row in await cursor.fetchall()]
        held = pause_of(found, self._column.embedding.column)
        return Held("pause", str(held)) if held is not None else None
