"""The one loop that embeds: prepare, pack, send, retry, halve. Adapters only send.

Errors have three kinds, each with its own treatment. Transient ones are retried with
exponential back-off and jitter. Global ones end the call. Input-bound ones halve the request
until the culprit stands alone; its neighbours are embedded.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

import numpy as np

from embedding_pipeline.embedders.budget import Budget, Clock, Sleep, budget_for
from embedding_pipeline.embedders.endpoints import located
from embedding_pipeline.embedders.errors import (
    EmbedError,
    GlobalError,
    InputError,
    TransientError,
)
from embedding_pipeline.embedders.inputs import Rules, prepare, shorten
from embedding_pipeline.embedders.job import History, Job
from embedding_pipeline.embedders.limiter import Limiter, Sent, limiter_for
from embedding_pipeline.embedders.packing import RequestLimits, halves, pack
from embedding_pipeline.embedders.port import EmbedResult, Endpoint, MayRepeat, Overlong
from embedding_pipeline.embedders.responses import Answer
from embedding_pipeline.embedders.tokens import TokenCounter, token_counter
from embedding_pipeline.embedders.wire import Wire

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0

PATIENCE = 3
"""Failures of one request, of a kind that a text may be the cause of, before it is halved."""
PATIENCE_OF_PARTS = 2
"""The same for the halves of such a request."""
SECONDS_TO_ARRIVE = 5.0
"""For answers, perhaps paid for, that are on their way when the call ends for another reason."""

SECONDS_WORTH_A_WARNING = 5.0

PERHAPS_BILLED = frozenset({"timeout", "broken", "response"})
"""Causes of failures after which the provider may have done its work, and count it."""

PROBE_TEXT = "a"
REFUSALS_WITHOUT_A_DOUBT = 3
"""Texts refused alone, with no text answered in between, before a plain text is tried."""


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
        budgets: Callable[[Endpoint, str], Budget] = budget_for,
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
        self._budgets = budgets
        self._overlong, self._prefix = overlong, prefix
        self._counter = counter
        self._sleep, self._clock = sleep, clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._answered = 0
        self._refusals_in_a_row = 0
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

    @property
    def _rules(self) -> Rules:
        return Rules(self.endpoint, self.counter, self._overlong, self._prefix)

    async def start(self) -> None:
        """See `Embedder.start`."""
        await self._start(retry=True)

    async def _start(self, *, retry: bool) -> None:
        history = History()
        self._failing_since = None
        if self._counter is None:
            self._counter = await asyncio.to_thread(token_counter, self.model)
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
                self._limiter = limiter or limiter_for(self.endpoint, self.model)
                self._budget = budget or self._budgets(self.endpoint, self.model)
                self._limiter.follow(self._budget)
                self._started = True
                return

    async def aclose(self) -> None:
        """See `Embedder.aclose`."""
        self._started = False
        await self._wire.close()

    def estimate_tokens(self, text: str) -> int:
        """See `Embedder.estimate_tokens`."""
        return min(self.counter.count(self._prefix + text), self._longest)

    def most_tokens(self, text: str) -> int:
        """See `Embedder.most_tokens`."""
        return min(self.counter.upper_bound(self._prefix + text), self._longest)

    @property
    def _longest(self) -> int:
        return min(
            self.endpoint.max_tokens_per_input,
            self.counter.longest or self.endpoint.max_tokens_per_input,
        )

    def cost(self, tokens: int) -> float:
        """See `Embedder.cost`."""
        return tokens * self.endpoint.price_per_million_tokens.get(self.model, 0.0) / 1_000_000

    async def embed(
        self, texts: Sequence[str], *, retry: bool = True, may_repeat: MayRepeat | None = None
    ) -> EmbedResult:
        """See `Embedder.embed`."""
        if not self._started:
            await self._start(retry=retry)
        if not self._jobs:
            self._failing_since = None
        self._jobs += 1
        try:
            job = await self._job(texts, retry=retry)
            job.may_repeat = may_repeat
            await self._run(job)
        finally:
            self._jobs -= 1
        job.result.truncated.sort()
        if job.error is not None:
            job.error.partial = job.result
            raise job.error
        return job.result

    async def _job(self, texts: Sequence[str], *, retry: bool) -> Job:
        rules = self._rules
        if rules.counter.exact and any(len(text) > rules.most_tokens // 2 for text in texts):
            # tokenizing takes a millisecond a page and lets go of the interpreter's lock
            inputs = await asyncio.to_thread(prepare, texts, rules)
        else:
            inputs = prepare(texts, rules)
        result = EmbedResult(
            # takes no memory until a part of it is known
            vectors=np.broadcast_to(np.float32(np.nan), (len(texts), self.dimensions)),
            done=np.zeros(len(texts), dtype=np.bool_),
            refused=inputs.refused,
            truncated=inputs.truncated,
        )
        return Job(inputs, result, retry, asyncio.get_running_loop().create_future())

    async def _run(self, job: Job) -> None:
        indices = list(job.inputs.weights)
        limits = RequestLimits(
            self.endpoint.max_inputs,
            self.endpoint.max_tokens_per_request,
            self.endpoint.max_bytes_per_request,
        )
        packed = pack(list(job.inputs.weights.values()), limits)
        if len(packed) == 1:
            await self._piece(job, indices, History())
            return
        async with asyncio.TaskGroup() as group:
            for positions in packed:
                group.create_task(self._piece(job, [indices[p] for p in positions], History()))

    async def _piece(self, job: Job, indices: list[int], history: History) -> None:
        """Embed these inputs: in one request, or in more where a text seems to be at fault."""
        tries, plain_text_worked = 0, False
        while job.error is None:
            try:
                answer = await self._send(job, indices, again=tries > 0)
                if answer is not None:
                    job.take(indices, answer)
                return
            except InputError as error:
                if len(indices) > 1:
                    await self._split(job, indices, History())
                elif shorten(job.inputs, indices[0], error.words, self._rules):
                    continue
                elif await self._works_for_others(job):
                    job.result.refused[indices[0]] = error.words
                    self._refusals_in_a_row += 1
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

    async def _revive(self, job: Job) -> None:
        """Start the local server again; it may get another address."""
        try:
            self.endpoint = await self._wire.open(await located(self._declared))
        except GlobalError as error:
            job.stop(error)
        except EmbedError:
            return  # not up yet; the next try will tell

    async def _split(self, job: Job, indices: list[int], history: History) -> None:
        left, right = (self._piece(job, half, replace(history)) for half in halves(indices))
        if self._answered:
            await asyncio.gather(left, right)
        else:
            # nothing was ever answered here: perhaps every text is refused, find out cheaply
            await left
            await right

    async def _works_for_others(self, job: Job) -> bool:
        """False, and the call ends, when the endpoint refuses a plain text as well.

        Otherwise a wrong parameter would be charged to every row of the table.
        """
        if self._answered and self._refusals_in_a_row < REFUSALS_WITHOUT_A_DOUBT:
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

    async def _answers_plain_text(self, job: Job) -> bool:
        """Whether the endpoint works at the moment, for a text that cannot be at fault."""
        try:
            return await self._request(job, [PROBE_TEXT], 1) is not None
        except GlobalError as error:
            job.stop(error)
            return False
        except (TransientError, InputError):
            return False

    async def _send(self, job: Job, indices: list[int], *, again: bool) -> Answer | None:
        tokens = sum(job.inputs.weights[index].tokens for index in indices)
        texts = [job.inputs.texts[index] for index in indices]
        return await self._request(job, texts, tokens, again=again)

    async def _request(
        self, job: Job, texts: list[str], tokens: int, *, again: bool = False
    ) -> Answer | None:
        """One request, when there is a place and budget for it; None: the call has ended."""
        sent = await self._enter(job, tokens)
        if sent is None:
            return None
        used: int | None = None
        try:
            job.result.requests += 1
            job.result.retried += again
            answer = await self._until_shortly_after_the_end(job, self._wire.send(texts))
            if answer is None:
                await self._perhaps_billed(job, texts, None)
                return None
            used = tokens if answer.tokens is None else answer.tokens
        except TransientError as error:
            if self._failing_since is None:
                self._failing_since = self._clock()
            if error.cause == "throttled":
                job.result.throttled += 1
                self._limiter.throttled(sent, error.retry_after)
            elif error.cause != "response":
                self._limiter.failed(error.retry_after)
            if error.cause in PERHAPS_BILLED:
                await self._perhaps_billed(job, texts, error)
            raise
        finally:
            self._limiter.leave()
            self._budget.release(tokens, used)
        self._limiter.succeeded(sent)
        self._failing_since = None
        self._answered += 1
        self._refusals_in_a_row = 0
        job.result.tokens += used
        self._budget.learn(
            _header(answer, "x-ratelimit-limit-requests"),
            _header(answer, "x-ratelimit-limit-tokens"),
        )
        return answer

    async def _perhaps_billed(self, job: Job, texts: list[str], error: EmbedError | None) -> None:
        if job.may_repeat is None:
            return
        most = sum(min(self.counter.upper_bound(text), self._longest) for text in texts)
        if not await job.may_repeat(most) and error is not None:
            job.stop(error)

    async def _enter(self, job: Job, tokens: int) -> Sent | None:
        drawn = entered = False

        async def permission() -> None:
            nonlocal drawn
            await self._budget.acquire(tokens)
            drawn = True

        entering = asyncio.ensure_future(self._limiter.enter(permission))
        try:
            await job.first_of(entering)
            entered = entering.done() and job.error is None
            return entering.result() if entered else None
        finally:
            if not entered:
                if not entering.cancel() and entering.exception() is None:
                    self._limiter.leave()
                if drawn:
                    self._budget.release(tokens, 0)

    async def _until_shortly_after_the_end(
        self, job: Job, sending: Coroutine[None, None, Answer]
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

    def _backoff(self, history: History, error: TransientError) -> float:
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
        level = logging.WARNING if pause >= SECONDS_WORTH_A_WARNING else logging.INFO
        logger.log(level, "%s (next try in %.1f s)", error, pause)
        return pause


def _header(answer: Answer, name: str) -> int | None:
    value = answer.headers.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None
