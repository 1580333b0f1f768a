"""The one loop that embeds: prepare, pack, send, retry, halve. Adapters only send.

Errors have three kinds, each with its own treatment. Transient ones are retried with
exponential back-off and jitter. Global ones end the call. Input-bound ones halve the request
until the culprit stands alone; its neighbours are embedded.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from embedding_pipeline.embedders.budget import Budget, Clock, Sleep, budget_for
from embedding_pipeline.embedders.endpoints import located
from embedding_pipeline.embedders.errors import (
    EmbedError,
    GlobalError,
    InputError,
    TransientError,
)
from embedding_pipeline.embedders.limiter import Limiter, limiter_for
from embedding_pipeline.embedders.packing import RequestLimits, Weight, halves, pack
from embedding_pipeline.embedders.port import EmbedResult, Endpoint, Overlong
from embedding_pipeline.embedders.responses import Answer
from embedding_pipeline.embedders.tokens import TokenCounter, token_counter
from embedding_pipeline.embedders.wire import Wire

T = TypeVar("T")

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0

PATIENCE = 3
"""Failures of one request, of a kind that a text may be the cause of, before it is halved."""
PATIENCE_WITH_PARTS = 2
"""The same for the parts of a request that was halved because of such failures."""

PROBE_TEXT = "a"


@dataclass
class _Job:
    """One `embed` call."""

    texts: list[str]
    """What is sent, prefix and cut included; empty where nothing is."""
    result: EmbedResult
    retry: bool
    stopped: asyncio.Event
    weights: dict[int, Weight] = field(default_factory=dict)
    """Of the texts to be sent, by index."""
    error: EmbedError | None = None

    def stop(self, error: EmbedError) -> None:
        if self.error is None:
            self.error = error
        self.stopped.set()

    async def unless_stopped(self, waiting: Awaitable[T]) -> T | None:
        """Wait, but no longer than the call goes on."""
        task = asyncio.ensure_future(waiting)
        stop = asyncio.ensure_future(self.stopped.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stop.cancel()


@dataclass
class _History:
    """What has failed so far of a request, or of the one that it is a part of."""

    is_part: bool = False
    first_failure: float | None = None
    failures: int = 0
    answered_before: int = 0

    def of_a_part(self, answered: int) -> "_History":
        """For a half: it goes on where the whole was, or anew if the endpoint works for others."""
        if answered > self.answered_before:
            return _History(is_part=True, answered_before=answered)
        return replace(self, is_part=True)


class ProviderEmbedder:
    """An `Embedder` over one wire."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        dimensions: int,
        wire: Wire,
        *,
        limiter: Limiter | None = None,
        budget: Budget | None = None,
        overlong: Overlong = "truncate",
        prefix: str = "",
        counter: TokenCounter | None = None,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.model = model
        self.dimensions = dimensions
        self._wire = wire
        self._given = (limiter, budget)
        self._overlong, self._prefix = overlong, prefix
        self._counter = counter
        self._sleep, self._clock = sleep, clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._answered = 0
        self._started = False

    def __repr__(self) -> str:
        return f"<embedder {self.endpoint.name} {self.model} {self.dimensions}>"

    @property
    def counter(self) -> TokenCounter:
        """The model's token counter, loaded when first needed."""
        if self._counter is None:
            self._counter = token_counter(self.model)
        return self._counter

    async def start(self) -> None:
        """See `Embedder.start`."""
        history = _History()
        self.endpoint = await located(self.endpoint)
        while True:
            try:
                self.endpoint = await self._wire.open(self.endpoint)
            except InputError as error:
                raise GlobalError(f"{self.endpoint.name} is not usable: {error}") from error
            except TransientError as error:
                await self._sleep(self._backoff(history, error))
            else:
                limiter, budget = self._given
                self._limiter = limiter or limiter_for(self.endpoint)
                self._budget = budget or budget_for(self.endpoint)
                self._started = True
                return

    async def aclose(self) -> None:
        """See `Embedder.aclose`."""
        self._started = False
        await self._wire.close()

    def estimate_tokens(self, text: str) -> int:
        """See `Embedder.estimate_tokens`."""
        return min(self.counter.count(self._prefix + text), self.endpoint.max_tokens_per_input)

    def cost(self, tokens: int) -> float:
        """See `Embedder.cost`."""
        return tokens * self.endpoint.price_per_million_tokens.get(self.model, 0.0) / 1_000_000

    async def embed(self, texts: Sequence[str], *, retry: bool = True) -> EmbedResult:
        """See `Embedder.embed`."""
        if not self._started:
            await self.start()
        result = EmbedResult(
            vectors=np.full((len(texts), self.dimensions), np.nan, dtype=np.float32),
            done=np.zeros(len(texts), dtype=np.bool_),
        )
        job = _Job([""] * len(texts), result, retry, asyncio.Event())
        await self._prepare(job, texts)
        wanted = list(job.weights)
        limits = RequestLimits(
            self.endpoint.max_inputs,
            self.endpoint.max_tokens_per_request,
            self.endpoint.max_bytes_per_request,
        )
        packed = pack([job.weights[index] for index in wanted], limits)
        async with asyncio.TaskGroup() as group:
            for positions in packed:
                group.create_task(self._piece(job, [wanted[p] for p in positions], _History()))
        result.truncated.sort()
        if job.error is not None:
            job.error.partial = result
            raise job.error
        return result

    async def _prepare(self, job: _Job, texts: Sequence[str]) -> None:
        """Refuse what must not be sent, cut what is too long; weigh the rest."""
        limit = self.endpoint.max_tokens_per_input
        weights = job.weights
        long: list[int] = []
        for index, text in enumerate(texts):
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                job.result.refused[index] = (
                    "not sent: the text holds half of a surrogate pair, which is not Unicode text"
                )
                continue
            if not text.strip():
                job.result.refused[index] = "not sent: the text is empty or blank"
                continue
            job.texts[index] = self._prefix + text
            weights[index] = Weight(size + len(self._prefix.encode()) + 8, 0)
            if weights[index].tokens > limit:
                long.append(index)
        if long:
            # tokenizing takes a millisecond a page and lets go of the interpreter's lock
            cuts = await asyncio.to_thread(
                self.counter.cut, [job.texts[index] for index in long], limit
            )
            for index, cut in zip(long, cuts, strict=True):
                if cut.overlong and self._overlong == "quarantine" and self.counter.exact:
                    job.result.refused[index] = (
                        f"not sent: longer than {limit} tokens, and the column's overlong policy "
                        "is quarantine"
                    )
                    del weights[index]
                    continue
                if cut.overlong and self._overlong == "truncate":
                    job.texts[index] = cut.text
                    job.result.truncated.append(index)
                # an estimate over the limit travels alone: the provider decides
                weights[index] = Weight(
                    self.endpoint.max_tokens_per_request if cut.overlong else cut.tokens, 0
                )
        for index in list(weights):
            size = _json_bytes(job.texts[index])
            if size > self.endpoint.max_bytes_per_request:
                job.result.refused[index] = (
                    f"not sent: {size} bytes, {self.endpoint.name} takes at most "
                    f"{self.endpoint.max_bytes_per_request} a request"
                )
                del weights[index]
            else:
                weights[index] = Weight(weights[index].tokens, size)

    async def _piece(self, job: _Job, indices: list[int], history: _History) -> None:
        """Embed these inputs: in one request, or in more where a text seems to be at fault."""
        tries, plain_text_worked = 0, False
        while job.error is None:
            try:
                answer = await self._send(job, indices, again=tries > 0)
                if answer is not None:
                    job.result.vectors[indices] = answer.vectors
                    job.result.done[indices] = True
                return
            except InputError as error:
                if len(indices) > 1:
                    await self._split(job, indices, _History(answered_before=self._answered))
                elif await self._works_for_others(job):
                    job.result.refused[indices[0]] = error.words
                return
            except TransientError as error:
                tries += 1
                if not job.retry:
                    job.stop(error)
                    return
                pause = self._pause_or_stop(job, error, history)
                patience = PATIENCE_WITH_PARTS if history.is_part else PATIENCE
                if error.cause not in ("throttled", "unreachable") and tries >= patience:
                    if len(indices) > 1:
                        await self._split(job, indices, history.of_a_part(self._answered))
                        return
                    if plain_text_worked:
                        job.result.refused[indices[0]] = (
                            f"failed {tries} times alone, while other texts are embedded: {error}"
                        )
                        return
                    plain_text_worked = await self._answers_plain_text(job)
                await job.unless_stopped(self._sleep(pause))
            except GlobalError as error:
                job.stop(error)

    async def _split(self, job: _Job, indices: list[int], history: _History) -> None:
        left, right = halves(indices)
        if self._answered:
            await asyncio.gather(
                self._piece(job, left, replace(history)), self._piece(job, right, replace(history))
            )
        else:
            # nothing was ever answered here: perhaps every text is refused, find out cheaply
            await self._piece(job, left, replace(history))
            await self._piece(job, right, replace(history))

    async def _works_for_others(self, job: _Job) -> bool:
        """False, and the call ends, when the endpoint refuses a plain text as well.

        Otherwise a wrong parameter would be charged to every row of the table.
        """
        if self._answered:
            return True
        try:
            await self._request(job, [PROBE_TEXT], 1)
        except InputError as error:
            job.stop(
                GlobalError(
                    f"{self.endpoint.name} refuses every text, also a plain one: {error.words}\n"
                    "No row is at fault; compare the model and its dimensions with what the "
                    "provider says"
                )
            )
            return False
        except TransientError:
            return True
        except GlobalError as error:
            job.stop(error)
            return False
        return job.error is None

    async def _answers_plain_text(self, job: _Job) -> bool:
        """Whether the endpoint works at the moment, for a text that cannot be at fault."""
        try:
            return await self._request(job, [PROBE_TEXT], 1) is not None
        except GlobalError as error:
            job.stop(error)
            return False
        except (TransientError, InputError):
            return False

    async def _send(self, job: _Job, indices: list[int], *, again: bool) -> Answer | None:
        tokens = sum(job.weights[index].tokens for index in indices)
        return await self._request(job, [job.texts[i] for i in indices], tokens, again=again)

    async def _request(
        self, job: _Job, texts: list[str], tokens: int, *, again: bool = False
    ) -> Answer | None:
        """One request when there is a place and budget for it; None: the call has ended."""
        async with self._limiter.slot():
            await job.unless_stopped(self._budget.acquire(tokens))
            if job.error is not None:
                return None
            job.result.requests += 1
            job.result.retried += again
            started = self._clock()
            try:
                answer = await self._wire.send(texts)
            except TransientError as error:
                if error.cause == "throttled":
                    job.result.throttled += 1
                    self._limiter.throttled(started, error.retry_after)
                raise
        self._limiter.succeeded()
        self._answered += 1
        used = tokens if answer.tokens is None else answer.tokens
        job.result.tokens += used
        self._budget.settle(tokens, used)
        self._budget.learn(
            _limit(answer, "x-ratelimit-limit-requests"), _limit(answer, "x-ratelimit-limit-tokens")
        )
        return answer

    def _pause_or_stop(self, job: _Job, error: TransientError, history: _History) -> float:
        try:
            return self._backoff(history, error)
        except TransientError as final:
            job.stop(final)
            return 0.0

    def _backoff(self, history: _History, error: TransientError) -> float:
        """Seconds to wait before the next try; raises when the time for retrying is used up."""
        now = self._clock()
        if history.first_failure is None:
            history.first_failure = now
            history.answered_before = self._answered
        ceiling = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0**history.failures)
        history.failures += 1
        # half of it is jitter, so that those who failed together do not come back together
        pause = ceiling * (0.5 + 0.5 * self._rng.random())
        if error.retry_after is not None:
            pause = max(pause, error.retry_after)
        tried = now - history.first_failure
        if tried + pause > self.endpoint.give_up_after_seconds:
            raise TransientError(
                f"{error}\nGiven up after {history.failures} failures in {tried:.0f} s; what was "
                "finished is kept, a later run goes on from there",
                cause=error.cause,
                retry_after=error.retry_after,
            ) from error
        return pause


def _limit(answer: Answer, name: str) -> int | None:
    value = answer.headers.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _json_bytes(text: str) -> int:
    """Bytes of the text in a request, quotes and comma included."""
    return len(json.dumps(text, ensure_ascii=False).encode()) + 1
