"""Queries when a provider is down: the other one answers, and says whose model it used.

Never for rows: a column holds one model's vectors, so rows wait for their provider.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from embedding_pipeline.embedders.budget import Clock
from embedding_pipeline.embedders.errors import EmbedError, InputError, TransientError
from embedding_pipeline.embedders.port import Embedder

QUERY_SECONDS = 3.0
"""For one provider's answer to a query."""
HEAD_START_SECONDS = 0.1
"""That a provider which failed before has over the other one, to show that it is back. One that
refuses connections loses it at once; one that is slower still answers if it is before the other."""
PROBE_EVERY_SECONDS = 0.5
"""How soon a provider is asked again whose last probe hangs: a server that could not be reached
takes new requests long before those that it lost come to their timeout."""


@dataclass(frozen=True)
class QueryVector:
    """A query's vector, and the endpoint and model that made it: search that model's column."""

    vector: np.ndarray[tuple[int], np.dtype[np.float32]]
    """float32 (dimensions,)."""
    endpoint: str
    model: str
    dimensions: int
    fell_back: bool
    """True when it is not the preferred provider's."""
    column: str | None = None
    """The column that holds this model's vectors, where the embedder was told."""


@dataclass(frozen=True)
class FallbackState:
    """Which provider answers queries now, since when, and what went wrong last."""

    active: str
    model: str
    since: datetime
    last_error: str | None = None
    last_error_at: datetime | None = None
    latency_ms: float | None = None
    """Of the last answer."""
    column: str | None = None
    fell_back: bool = False


class FallbackEmbedder:
    """A circuit breaker over two embedders; each query gets one vector.

    Closed: the preferred provider is asked. Its first failure opens the circuit; that query and
    the next ones go to the other. Half-open: while open, a query also asks the preferred one,
    with a head start, one such probe at a time or `PROBE_EVERY_SECONDS`; as soon as it answers it
    is active again, for this very query if it was before the other. Without a `secondary` only
    the first state exists.

    `columns` are the columns that the two models fill. `on_state` hears of the state after each
    answer and each failure; it must return at once and raise nothing.
    """

    def __init__(
        self,
        primary: Embedder,
        secondary: Embedder | None = None,
        *,
        query_seconds: float = QUERY_SECONDS,
        head_start_seconds: float = HEAD_START_SECONDS,
        clock: Clock = time.monotonic,
        columns: tuple[str | None, str | None] = (None, None),
        on_state: Callable[[FallbackState], None] = lambda _: None,
    ) -> None:
        self._primary, self._secondary = primary, secondary
        self._columns, self._on_state = columns, on_state
        self._query_seconds, self._head_start = query_seconds, head_start_seconds
        self._clock = clock
        self._open = False
        self._probes: set[asyncio.Task[QueryVector]] = set()
        self._probed_at = 0.0
        self._primary_error: EmbedError | None = None
        self._state = FallbackState(
            primary.endpoint.name, primary.model, datetime.now(UTC), column=columns[0]
        )

    @property
    def state(self) -> FallbackState:
        """A snapshot."""
        return self._state

    async def embed_query(self, text: str) -> QueryVector:
        """The query's vector from whoever answers.

        Raises InputError when the query itself is refused (blank, too long for the model), and
        TransientError when nobody answers: then only full-text search is left.
        """
        try:
            return await self._embed_query(text)
        finally:
            self._on_state(self._state)

    async def _embed_query(self, text: str) -> QueryVector:
        if self._secondary is None:
            try:
                return await self._ask(self._primary, text)
            except InputError:
                raise
            except EmbedError as error:
                self._note(error)
                raise
        if not self._open:
            try:
                return await self._ask(self._primary, text)
            except InputError:
                raise
            except EmbedError as error:
                self._note(error)
                self._primary_error = error
                self._switch(opened=True)
                return await self._ask_secondary(self._secondary, text)
        return await self._ask_while_open(self._secondary, text)

    async def aclose(self) -> None:
        """Close both embedders."""
        probes = self._cancel_probes()
        await asyncio.gather(*probes, return_exceptions=True)
        await self._primary.aclose()
        if self._secondary is not None:
            await self._secondary.aclose()

    async def _ask_while_open(self, secondary: Embedder, text: str) -> QueryVector:
        probe = self._new_probe(text)
        if probe is None:
            return await self._ask_secondary(secondary, text)
        await asyncio.wait({probe}, timeout=self._head_start)
        if _has_answered(probe):
            return probe.result()
        other = asyncio.create_task(self._ask_secondary(secondary, text))
        try:
            await asyncio.wait({probe, other}, return_when=asyncio.FIRST_COMPLETED)
            if not _has_answered(probe) and not (_has_answered(other) or _is_refused(other)):
                # one has failed: who is left may be the only one that works
                await asyncio.wait({probe, other})
            return probe.result() if _has_answered(probe) else await other
        finally:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)

    def _new_probe(self, text: str) -> "asyncio.Task[QueryVector] | None":
        """The preferred provider's answer to come; None while it is too soon to ask again."""
        now = self._clock()
        if self._probes and now - self._probed_at < PROBE_EVERY_SECONDS:
            return None
        self._probed_at = now
        probe = asyncio.create_task(self._ask(self._primary, text))
        self._probes.add(probe)
        probe.add_done_callback(self._probed)
        return probe

    def _probed(self, probe: "asyncio.Task[QueryVector]") -> None:
        self._probes.discard(probe)
        if probe.cancelled():
            return
        error = probe.exception()
        if error is None or isinstance(error, InputError):
            # a refusal is an answer as well
            self._cancel_probes()
            self._switch(opened=False)
        elif isinstance(error, EmbedError):
            self._note(error)
            self._primary_error = error

    def _cancel_probes(self) -> "list[asyncio.Task[QueryVector]]":
        """Those that are still waiting have nothing more to tell."""
        probes = list(self._probes)
        for probe in probes:
            probe.cancel()
        return probes

    async def _ask_secondary(self, secondary: Embedder, text: str) -> QueryVector:
        try:
            return replace(await self._ask(secondary, text), fell_back=True)
        except InputError:
            raise
        except EmbedError as error:
            self._note(error)
            raise TransientError(
                f"no provider answers queries.\n{self._primary.endpoint.name}: "
                f"{self._primary_error}\n{secondary.endpoint.name}: {error}",
                cause="unreachable",
            ) from error

    async def _ask(self, embedder: Embedder, text: str) -> QueryVector:
        began = self._clock()
        try:
            async with asyncio.timeout(self._query_seconds):
                result = await embedder.embed([text], retry=False)
        except TimeoutError:
            raise TransientError(
                f"{embedder.endpoint.name} did not answer a query within {self._query_seconds:g} s",
                cause="timeout",
            ) from None
        if 0 in result.refused:
            raise InputError(result.refused[0])
        latency = 1000 * (self._clock() - began)
        self._state = replace(self._state, latency_ms=round(latency, 1))
        vector: np.ndarray[Any, np.dtype[np.float32]] = result.vectors[0]
        return QueryVector(
            vector,
            embedder.endpoint.name,
            embedder.model,
            embedder.dimensions,
            fell_back=False,
            column=self._columns[embedder is self._secondary],
        )

    def _switch(self, *, opened: bool) -> None:
        if self._secondary is None or self._open == opened:
            return
        self._open = opened
        active = self._secondary if opened else self._primary
        self._state = replace(
            self._state,
            active=active.endpoint.name,
            model=active.model,
            since=datetime.now(UTC),
            column=self._columns[opened],
            fell_back=opened,
        )
        self._on_state(self._state)

    def _note(self, error: EmbedError) -> None:
        self._state = replace(self._state, last_error=str(error), last_error_at=datetime.now(UTC))


def _has_answered(asked: "asyncio.Task[QueryVector]") -> bool:
    return asked.done() and not asked.cancelled() and asked.exception() is None


def _is_refused(asked: "asyncio.Task[QueryVector]") -> bool:
    return asked.done() and not asked.cancelled() and isinstance(asked.exception(), InputError)
