"""Texts to the provider: packed into batches, as far as the money goes, so many in flight."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from embedding_pipeline.backfill.flow import Batch, Flow, Waiting, Write
from embedding_pipeline.backfill.outcome import TOO_DEAR
from embedding_pipeline.brakes import BrakedError, Reservation
from embedding_pipeline.embedders import Embedder, EmbedError, EmbedResult
from embedding_pipeline.store.writer import StagedRow

BATCH_BYTES = 1024 * 1024
"""A batch is full with this much text, whatever its number of rows: memory stays flat."""


class Sender:
    """Fills batches; its workers send them and hand what comes back to the writer."""

    def __init__(self, flow: Flow, embedder: Embedder) -> None:
        self.flow, self.embedder = flow, embedder
        self.options, self.outcome = flow.options, flow.outcome
        self._batch = Batch()
        # one ahead of each worker: the next batch is at hand when a place is free
        self._batches: asyncio.Queue[Batch | None] = asyncio.Queue(flow.options.concurrency)
        self._batches_out = 0
        self._reserved_tokens = 0
        self._too_dear = False
        self._asking = 0

    # ---- packing -----------------------------------------------------------------------------

    async def add(
        self, partition: str, key: tuple[str, ...], fingerprint: bytes, text: str
    ) -> None:
        """A row whose text is to be embedded; equal texts on their way are one input."""
        if self._too_dear or self.outcome.held:
            return
        self.flow.count_read(partition)
        waiting = self.flow.flying.get(fingerprint)
        if waiting is None:
            waiting = self.flow.flying[fingerprint] = Waiting(text, fingerprint)
            self._batch.inputs.append(waiting)
            self._batch.characters += len(text)
        waiting.rows.append((partition, key))
        if (
            len(self._batch.inputs) >= self.options.batch_size
            or self._batch.characters >= BATCH_BYTES
        ):
            await self.flush()

    async def flush(self) -> None:
        """Queue the batch that was being filled, as far as its cost may not pass the cap."""
        batch, self._batch = self._batch, Batch()
        waiting = batch.inputs
        if self.outcome.held:
            self._abandon(waiting)
            return
        while waiting:
            afforded = await self._affordable(waiting)
            if not afforded.inputs:
                self._stop_for_cost()
                self._abandon(waiting)
                return
            waiting = waiting[len(afforded.inputs) :]
            self._batches_out += 1
            await self._batches.put(afforded)

    async def end(self, workers: int) -> None:
        """Let the workers end, once they have sent what is queued."""
        for _ in range(workers):
            await self._batches.put(None)

    # ---- money -------------------------------------------------------------------------------

    async def _affordable(self, waiting: list[Waiting]) -> Batch:
        """As many of these inputs as can be paid for whatever the provider counts.

        What they cost at most is reserved until it is known what they came to. When not even
        half of them fit, that is waited for.
        """
        if not self._is_capped:
            return Batch(waiting)
        tokens = list(accumulate(self.embedder.most_tokens(each.text) for each in waiting))
        while True:
            fitting = sum(self._fits(reached) for reached in tokens)
            if (
                2 * fitting >= len(waiting)
                or self._batches_out == 0
                or self.flow.failure is not None
            ):
                break
            await self.flow.wait_until(partial(self._fewer_out, self._batches_out))
        reserved = tokens[fitting - 1] if fitting else 0
        self._reserved_tokens += reserved
        return Batch(waiting[:fitting], tokens=reserved)

    @property
    def _is_capped(self) -> bool:
        return self.options.max_cost is not None and self.embedder.cost(1_000_000) > 0

    def _fits(self, tokens: int) -> bool:
        """Whether so many more tokens could still be paid for."""
        spoken_for = self.outcome.tokens + self.outcome.unconfirmed_tokens + self._reserved_tokens
        most = self.options.max_cost
        return most is None or self.embedder.cost(spoken_for + tokens) <= most

    def _fewer_out(self, before: int) -> bool:
        return self._batches_out < before

    async def _may_repeat(self, billed: "_PerhapsBilled", tokens: int) -> bool:
        """Whether a request may be sent again that was perhaps paid for, with so many tokens.

        What was reserved for it is spent, perhaps; the next try needs as much again.
        """
        self.outcome.unconfirmed_tokens += tokens
        billed.tokens += tokens
        if self._is_capped and not self._fits(0):
            self._stop_for_cost()
            return False
        try:
            reservation = await self.flow.brake.reserve(self.embedder.cost(tokens))
        except BrakedError as braked:
            self.flow.halt(braked.held)
            return False
        billed.reservations.append(reservation)
        return True

    async def _reserve(self, batch: Batch) -> Reservation | None:
        """Leave to send a batch; None when a brake, or a failure meanwhile, stops the run.

        What requests in flight turn out not to cost may make room for it, so they are waited for.
        """
        flow, embedder = self.flow, self.embedder
        most = 0.0
        if embedder.cost(1_000_000):
            tokens = sum(embedder.most_tokens(waiting.text) for waiting in batch.inputs)
            most = embedder.cost(tokens)
        while flow.failure is None and flow.outcome.held is None:
            try:
                return await flow.brake.reserve(most)
            except BrakedError as braked:
                if not braked.may_ease:
                    flow.halt(braked.held)
                elif self._asking:
                    await flow.wait_until(partial(self._fewer_asking, self._asking))
        return None

    def _fewer_asking(self, before: int) -> bool:
        return self._asking < before

    def _stop_for_cost(self) -> None:
        self._too_dear = True
        self.outcome.stopped = f"max_cost of ${self.options.max_cost:g} {TOO_DEAR}"

    # ---- embedding ---------------------------------------------------------------------------

    async def work(self) -> None:
        """Send batches until there are none; one of several such workers.

        A batch is in flight until its rows are in the table: the next one is not sent before, so
        that a run that is killed has paid for no more than one batch a worker in vain.
        """
        while (batch := await self._batches.get()) is not None:
            try:
                await self._embed(batch)
            except Exception as error:  # noqa: BLE001 - handed to the run, which raises it
                self.flow.fail(error)
            await self.flow.wait_until(partial(_is_written, batch))

    async def _embed(self, batch: Batch) -> None:
        reservation = await self._reserve(batch)
        if reservation is None:
            self._reserved_tokens -= batch.tokens
            self._batches_out -= 1
            self._abandon(batch.inputs)
            return
        self._asking += 1
        cost = 0.0
        billed = _PerhapsBilled()
        try:
            result = await self.embedder.embed(
                [item.text for item in batch.inputs],
                may_repeat=partial(self._may_repeat, billed),
            )
            cost = self.embedder.cost(result.tokens)
        except EmbedError as error:
            if error.partial is None:
                raise
            cost = self.embedder.cost(error.partial.tokens)
            await self._take(batch, error.partial)
            if self._too_dear or self.outcome.held:
                return  # ended by us, not by the provider: what is not finished stays pending
            raise
        finally:
            self._asking -= 1
            self.flow.brake.settle(reservation, cost + self.embedder.cost(billed.tokens))
            for repeated in billed.reservations:
                self.flow.brake.settle(repeated, 0.0)
        await self._take(batch, result)

    async def _take(self, batch: Batch, result: EmbedResult) -> None:
        """Hand vectors and refusals to the writer; what is neither stays pending."""
        self._account(batch, result)
        flow, memory = self.flow, self.flow.memory
        truncated = set(result.truncated)
        counts = flow.outcome.partitions
        writes: list[Write] = []
        unfinished: list[Waiting] = []
        known = zip(batch.inputs, result.done.tolist(), result.vectors, strict=True)
        for index, (waiting, done, vector) in enumerate(known):
            fingerprint = waiting.fingerprint
            flow.flying.pop(fingerprint, None)
            if (error := result.refused.get(index)) is not None:
                memory.refused[fingerprint] = error
                writes += [
                    Write(key, StagedRow(row, fingerprint, None), "quarantined", error, batch)
                    for key, row in waiting.rows
                ]
            elif done:
                memory.unwritten.add(fingerprint)
                memory.keep(fingerprint, vector)
                for number, (key, row) in enumerate(waiting.rows):
                    if index in truncated:
                        counts[key].truncated += 1
                    staged = StagedRow(row, fingerprint, vector)
                    kind = "reused" if number else "embedded"
                    writes.append(Write(key, staged, kind, batch=batch))
            else:
                unfinished.append(waiting)
        if writes:
            batch.unwritten = len(writes)
            await flow.writes.put(writes)
        self._abandon(unfinished)

    def _account(self, batch: Batch, result: EmbedResult) -> None:
        outcome = self.outcome
        outcome.tokens += result.tokens
        outcome.requests += result.requests
        outcome.throttled += result.throttled
        outcome.retried += result.retried
        outcome.cost = self.embedder.cost(outcome.tokens)
        self._reserved_tokens -= batch.tokens
        self._batches_out -= 1

    def _abandon(self, inputs: Sequence[Waiting]) -> None:
        """Let rows go without a vector: they stay pending."""
        for waiting in inputs:
            self.flow.flying.pop(waiting.fingerprint, None)
        self.flow.settle(sum(len(waiting.rows) for waiting in inputs))


@dataclass
class _PerhapsBilled:
    """Requests of one batch that brought no usable answer and may have been paid for."""

    tokens: int = 0
    reservations: list[Reservation] = field(default_factory=list)
    """For the tries after them."""


def _is_written(batch: Batch) -> bool:
    return batch.unwritten == 0
