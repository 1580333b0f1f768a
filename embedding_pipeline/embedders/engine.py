"""The one loop that embeds: prepare, pack, send, retry, halve. Adapters only send.

Errors have three kinds, each with its own treatment. Transient ones are retried with
exponential back-off and jitter. Global ones end the call. Input-bound ones halve the request
until the culprit stands alone; its neighbours are embedded.
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic_core import to_json

from embedding_pipeline.embedders.budget import Budget, Clock, Sleep, budget_for
from embedding_pipeline.embedders.endpoints import located
from embedding_pipeline.embedders.errors import (
    EmbedError,
    GlobalError,
    InputError,
    TransientError,
)
from embedding_pipeline.embedders.limiter import Limiter, Sent, limiter_for
from embedding_pipeline.embedders.packing import RequestLimits, Weight, halves, pack
from embedding_pipeline.embedders.port import EmbedResult, Endpoint, Overlong
from embedding_pipeline.embedders.responses import Answer
from embedding_pipeline.embedders.tokens import TokenCounter, token_counter
from embedding_pipeline.embedders.wire import Wire

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0

PATIENCE = 3
"""Failures of one request, of a kind that a text may be the cause of, before it is halved."""
PATIENCE_OF_PARTS = 2
"""The same for the halves of such a request."""
SECONDS_TO_ARRIVE = 5.0
"""For answers, perhaps paid for, that are on their way when the call ends for another reason."""

PROBE_TEXT = "a"

_TOO_LONG = re.compile(r"token|length|too long", re.IGNORECASE)
_COUNTED = re.compile(r"(\d{1,12}) tokens|given: (\d{1,12})", re.IGNORECASE)


@dataclass
class _Job:
    """One `embed` call."""

    texts: list[str]
    """What is sent, prefix and cut included; empty where nothing is."""
    result: EmbedResult
    retry: bool
    stopped: "asyncio.Future[None]"
    weights: dict[int, Weight] = field(default_factory=dict)
    """Of the texts to be sent, by index."""
    error: EmbedError | None = None

    def stop(self, error: EmbedError) -> None:
        """The first error is the call's; nothing more is sent."""
        if self.error is None:
            self.error = error
            self.stopped.set_result(None)

    async def sleep(self, waiting: Awaitable[None]) -> None:
        """Wait, but no longer than the call goes on."""
        task = asyncio.ensure_future(waiting)
        try:
            await self.first_of(task)
        finally:
            task.cancel()

    async def first_of(self, task: "asyncio.Future[Any]") -> None:
        """Wait until the task is done or the call has ended."""
        waited_for: set[asyncio.Future[Any]] = {task, self.stopped}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)


@dataclass
class _History:
    """What has failed so far of a request, or of the one that it is a part of."""

    failures: int = 0
    answered_before: int = 0
    is_part: bool = False


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
        self.endpoint = self._declared = endpoint
        self.model = model
        self.dimensions = dimensions
        self._wire = wire
        self._given = (limiter, budget)
        self._overlong, self._prefix = overlong, prefix
        self._counter = counter
        self._sleep, self._clock = sleep, clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._answered = 0
        self._failing_since: float | None = None
        self._jobs = 0
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
        await self._start(retry=True)

    async def _start(self, *, retry: bool) -> None:
        history = _History()
        self._failing_since = None
        while True:
            try:
                # again each time: the local server is started anew where it has died
                self.endpoint = await self._wire.open(await located(self._declared))
            except InputError as error:
                raise GlobalError(f"{self.endpoint.name} is not usable: {error}") from error
            except TransientError as error:
                if not retry:
                    raise
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
        longest = min(
            self.endpoint.max_tokens_per_input,
            self.counter.longest or self.endpoint.max_tokens_per_input,
        )
        return min(self.counter.count(self._prefix + text), longest)

    def cost(self, tokens: int) -> float:
        """See `Embedder.cost`."""
        return tokens * self.endpoint.price_per_million_tokens.get(self.model, 0.0) / 1_000_000

    async def embed(self, texts: Sequence[str], *, retry: bool = True) -> EmbedResult:
        """See `Embedder.embed`."""
        if not self._started:
            await self._start(retry=retry)
        result = EmbedResult(
            vectors=np.full((len(texts), self.dimensions), np.nan, dtype=np.float32),
            done=np.zeros(len(texts), dtype=np.bool_),
        )
        stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job = _Job([""] * len(texts), result, retry, stopped)
        if not self._jobs:
            self._failing_since = None
        self._jobs += 1
        try:
            await self._prepare(job, texts)
            await self._run(job)
        finally:
            self._jobs -= 1
        result.truncated.sort()
        if job.error is not None:
            job.error.partial = result
            raise job.error
        return result

    async def _run(self, job: _Job) -> None:
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

    async def _prepare(self, job: _Job, texts: Sequence[str]) -> None:
        """Refuse what must not be sent, cut what is too long, weigh the rest."""
        refused = job.result.refused
        for index, text in enumerate(texts):
            if not text.strip():
                refused[index] = "not sent: the text is empty or blank"
            elif _is_broken(text):
                refused[index] = "not sent: half of a surrogate pair, which is not Unicode text"
            else:
                job.texts[index] = self._prefix + text
        sendable = [index for index, text in enumerate(job.texts) if text]
        # tokenizing takes a millisecond a page and lets go of the interpreter's lock
        cuts = await asyncio.to_thread(
            self.counter.cut,
            [job.texts[index] for index in sendable],
            self.endpoint.max_tokens_per_input,
        )
        for index, cut in zip(sendable, cuts, strict=True):
            tokens = cut.tokens
            if cut.overlong and self._overlong == "truncate":
                job.texts[index] = cut.text
                job.result.truncated.append(index)
            elif cut.overlong and self.counter.exact:
                refused[index] = (
                    f"not sent: longer than {self.endpoint.max_tokens_per_input} tokens, and the "
                    "column's YAML says overlong: quarantine"
                )
                continue
            elif cut.overlong:
                # only an estimate: the provider decides, in a request of its own
                tokens = self.endpoint.max_tokens_per_request
            size = _json_bytes(job.texts[index])
            if size > self.endpoint.max_bytes_per_request:
                refused[index] = (
                    f"not sent: {size} bytes, {self.endpoint.name} takes at most "
                    f"{self.endpoint.max_bytes_per_request} a request"
                )
                continue
            job.weights[index] = Weight(tokens, size)

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
                    await self._split(job, indices, _History())
                elif self._shortened(job, indices[0], error.words):
                    continue
                elif await self._works_for_others(job):
                    job.result.refused[indices[0]] = error.words
                return
            except TransientError as error:
                tries += 1
                if not job.retry:
                    job.stop(error)
                    return
                try:
                    pause = self._backoff(history, error)
                except TransientError as final:
                    job.stop(final)
                    return
                patience = PATIENCE_OF_PARTS if history.is_part else PATIENCE
                if error.cause not in ("throttled", "unreachable") and tries >= patience:
                    if len(indices) > 1:
                        # one of the texts may be why; if none is, smaller requests do no harm
                        await self._split(job, indices, replace(history, is_part=True))
                        return
                    if plain_text_worked:
                        job.result.refused[indices[0]] = (
                            f"failed {tries} times alone, while other texts are embedded: {error}"
                        )
                        return
                    plain_text_worked = await self._answers_plain_text(job)
                await job.sleep(self._sleep(pause))
                if error.cause == "unreachable" and not self._declared.base_url:
                    await self._revive(job)
            except GlobalError as error:
                job.stop(error)

    async def _revive(self, job: _Job) -> None:
        """Start the local server again; it may get another address."""
        try:
            self.endpoint = await self._wire.open(await located(self._declared))
        except GlobalError as error:
            job.stop(error)
        except EmbedError:
            return  # not up yet; the next try will tell

    async def _split(self, job: _Job, indices: list[int], history: _History) -> None:
        left, right = (self._piece(job, half, replace(history)) for half in halves(indices))
        if self._answered:
            await asyncio.gather(left, right)
        else:
            # nothing was ever answered here: perhaps every text is refused, find out cheaply
            await left
            await right

    def _shortened(self, job: _Job, index: int, words: str) -> bool:
        """Cut a text further that the provider finds too long where the estimate did not.

        By the provider's own count where its words name it ("… requested 8610 tokens", "Given:
        300"), else by a quarter. Not for `overlong: quarantine`, and not where our count is exact.
        """
        if self._overlong != "truncate" or self.counter.exact or not _TOO_LONG.search(words):
            return False
        text, limit = job.texts[index], self.endpoint.max_tokens_per_input
        counted = max((int(n) for pair in _COUNTED.findall(words) for n in pair if n), default=0)
        share = min(0.75, 0.98 * limit / counted) if counted > limit else 0.75
        shorter = text[: int(share * len(text))]
        if self.counter.roughly(shorter) < limit // 8 or not shorter.strip():
            return False  # length is not what is wrong with it
        job.texts[index] = shorter
        job.weights[index] = Weight(self.counter.roughly(shorter), _json_bytes(shorter))
        if index not in job.result.truncated:
            job.result.truncated.append(index)
        return True

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
        """One request, when there is a place and budget for it; None: the call has ended."""
        sent = await self._enter(job, tokens)
        if sent is None:
            return None
        try:
            job.result.requests += 1
            job.result.retried += again
            answer = await self._until_shortly_after_the_end(job, self._wire.send(texts))
        except TransientError as error:
            if self._failing_since is None:
                self._failing_since = self._clock()
            if error.cause == "throttled":
                job.result.throttled += 1
                self._limiter.throttled(sent, error.retry_after)
            elif error.cause != "response":
                self._limiter.failed(error.retry_after)
            raise
        finally:
            self._limiter.leave()
        if answer is None:
            return None
        self._limiter.succeeded(sent)
        self._failing_since = None
        self._answered += 1
        used = tokens if answer.tokens is None else answer.tokens
        job.result.tokens += used
        self._budget.settle(tokens, used)
        self._budget.learn(
            _header(answer, "x-ratelimit-limit-requests"),
            _header(answer, "x-ratelimit-limit-tokens"),
        )
        return answer

    async def _enter(self, job: _Job, tokens: int) -> Sent | None:
        entering = asyncio.ensure_future(self._limiter.enter(lambda: self._budget.acquire(tokens)))
        entered = False
        try:
            await job.first_of(entering)
            entered = entering.done() and job.error is None
            return entering.result() if entered else None
        finally:
            if not entered and not entering.cancel():
                entering.result()
                self._limiter.leave()

    async def _until_shortly_after_the_end(
        self, job: _Job, sending: Coroutine[None, None, Answer]
    ) -> Answer | None:
        """The answer; when the call ends meanwhile, what is on its way has a moment to arrive."""
        task = asyncio.ensure_future(sending)
        try:
            await job.first_of(task)
            if not task.done():
                await asyncio.wait({task}, timeout=SECONDS_TO_ARRIVE)
            return task.result() if task.done() else None
        finally:
            task.cancel()

    def _backoff(self, history: _History, error: TransientError) -> float:
        """Seconds to wait before the next try; raises when the time for retrying is used up.

        The time counts from the first failure since the endpoint's last answer, whatever text it
        was for: a request that comes second to a busy endpoint is not given up.
        """
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if self._answered > history.answered_before:
            history.failures, history.answered_before = 0, self._answered
        ceiling = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0**history.failures)
        history.failures += 1
        # half of it is jitter, so that those who failed together do not come back together
        pause = ceiling * (0.5 + 0.5 * self._rng.random())
        if error.retry_after is not None:
            pause = max(pause, error.retry_after)
        failing = now - self._failing_since
        if failing + pause > self.endpoint.give_up_after_seconds:
            raise TransientError(
                f"{error}\nGiven up: {self.endpoint.name} has not answered one request in "
                f"{failing:.0f} s and the next try would be in {pause:.0f} s (limit "
                f"{self.endpoint.give_up_after_seconds:g} s). What was finished is kept; a later "
                "run goes on from there",
                cause=error.cause,
                retry_after=error.retry_after,
            ) from error
        return pause


def _header(answer: Answer, name: str) -> int | None:
    value = answer.headers.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_bytes(text: str) -> int:
    """Bytes of the text in a request, quotes and comma included."""
    return len(to_json(text)) + 1
