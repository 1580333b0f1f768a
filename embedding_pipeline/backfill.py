"""The backfill core: pending → embed → write, overlapped, with flat memory. Plain asyncio.

    reader ──rows──▶ batches ──▶ embed workers ──vectors──▶ writer

Assets, the command line and tests call `backfill`; nothing here knows Dagster. Rows of several
partitions share batches, so that a thousand small partitions cost no more than one large one.
The queues between the stages are bounded, which is what keeps memory flat.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from embedding_pipeline.brakes import Brake, BrakedError, Held, NoBrake, Reservation
from embedding_pipeline.embedders import Embedder, EmbedError, EmbedResult
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.pending import PAGE_BYTES, PendingRow, read_page
from embedding_pipeline.store.quarantine import Refusal, quarantine
from embedding_pipeline.store.reconnecting import ReconnectingConnection
from embedding_pipeline.store.writer import StagedRow, Writer, Written, stored_vectors

REMEMBERED_BYTES = 32 * 1024 * 1024
"""Of recent vectors kept for equal texts, and as much again for rows that were locked."""
REMEMBERED_PLACES = 200_000
"""Texts of which a run remembers in which row their vector is, once the vector is forgotten."""
BATCH_BYTES = 1024 * 1024
"""A batch is full with this much text, whatever its number of rows: memory stays flat."""
MOST_OUTSTANDING = 8192
"""Rows between reader and writer: a text that a million rows share is one input only."""
MOST_PASSES = 8
"""How often a run re-reads its partitions for rows that arrived or were locked meanwhile."""
TOO_DEAR = "would be passed"
"""In `Outcome.stopped` of a run that its cost cap ended."""
MOST_IDLE_PASSES = 3
"""After so many passes in a row that changed nothing a run leaves the rest to the next one."""
PROGRESS_SECONDS = 0.5

Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Options:
    """What a run may do. `limit` rows and `max_cost` US dollars are never passed."""

    limit: int | None = None
    batch_size: int = 64
    concurrency: int = 8
    max_cost: float | None = None


@dataclass
class Counts:
    """What became of rows; one of these per partition, and their sum per run."""

    read: int = 0
    embedded: int = 0
    reused: int = 0
    """Written with a vector that was there already: an equal text in this run or in the column."""
    cleared: int = 0
    superseded: int = 0
    locked: int = 0
    quarantined: int = 0
    truncated: int = 0
    gone: int = 0

    def add(self, other: "Counts") -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    @property
    def written(self) -> int:
        return self.embedded + self.reused + self.cleared


@dataclass
class Outcome:
    """What a run did, whether or not it reached the end."""

    partitions: dict[str, Counts]
    tokens: int = 0
    requests: int = 0
    throttled: int = 0
    retried: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    stopped: str | None = None
    """Why the run ended before its partitions were empty; None when it did not."""
    held: Held | None = None
    """The brake that stopped it, where one did."""

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.partitions.values():
            total.add(counts)
        return total


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `remaining` and `eta_seconds` are None when the total is not known."""

    done: int
    rate: float
    remaining: int | None
    eta_seconds: float | None

    def __str__(self) -> str:
        text = f"{self.done:,} rows, {self.rate:,.0f} rows/s"
        if self.remaining is not None:
            text += f", {self.remaining:,} remaining"
        if self.eta_seconds is not None:
            text += f", about {_duration(self.eta_seconds)} left"
        return text


class BackfillError(PipelineError):
    """A run had to stop; `outcome` says what it had finished, all of which is kept."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass
class _Waiting:
    """An input on its way to the provider and the rows (partition, key) that wait for it."""

    text: str
    fingerprint: UUID
    rows: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)


@dataclass
class _Batch:
    """Inputs of one request, and the tokens that are reserved for it under a cost cap."""

    inputs: list[_Waiting] = field(default_factory=list)
    characters: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Write:
    """A row for the writer: with a vector, to be cleared, or (with an error) to quarantine."""

    partition: str
    row: StagedRow
    kind: str
    """The count in `Counts` that it adds to when it is done."""
    error: str = ""


class _Memory:
    """What a run must not pay for twice, within a fixed number of bytes."""

    def __init__(self, dimensions: int) -> None:
        self.most = max(256, REMEMBERED_BYTES // (4 * dimensions))
        self.recent: OrderedDict[UUID, Vector] = OrderedDict()
        self.unwritten: set[UUID] = set()
        """On their way to the writer: until they are written nobody else could recall them."""
        self.page: set[UUID] = set()
        """Of the page being handed on: what was at hand when it was read must stay so."""
        self.locked: dict[UUID, tuple[Vector, str]] = {}
        """Not written because somebody held the row, and what the row counts as."""
        self.given_up: set[UUID] = set()
        """The same, but without room for the vector: such rows are left to the next run."""
        self.places: OrderedDict[UUID, tuple[str, ...]] = OrderedDict()
        """The key of a row that was given this vector."""
        self.refused: dict[UUID, str] = {}

    def vector(self, fingerprint: UUID) -> tuple[Vector, str] | None:
        """A text's vector, if it is at hand, and what a row counts as that is given it."""
        if (locked := self.locked.get(fingerprint)) is not None:
            return locked
        if (vector := self.recent.get(fingerprint)) is None:
            return None
        self.recent.move_to_end(fingerprint)
        return vector, "reused"

    def keep(self, fingerprint: UUID, vector: Vector) -> None:
        self.recent[fingerprint] = vector
        self.recent.move_to_end(fingerprint)
        while len(self.recent) > self.most:
            oldest = next(
                (old for old in self.recent if old not in self.unwritten and old not in self.page),
                None,
            )
            if oldest is None:
                return
            del self.recent[oldest]

    def keep_locked(self, fingerprint: UUID, vector: Vector, kind: str) -> None:
        if len(self.locked) < self.most:
            self.locked.setdefault(fingerprint, (vector, kind))
        elif fingerprint not in self.locked:
            self.given_up.add(fingerprint)

    def written(self, fingerprint: UUID, key: tuple[str, ...]) -> None:
        if (locked := self.locked.pop(fingerprint, None)) is not None:
            self.keep(fingerprint, locked[0])
        self.places[fingerprint] = key
        if len(self.places) > REMEMBERED_PLACES:
            self.places.popitem(last=False)


class _Run:
    def __init__(
        self,
        url: str,
        column: Column,
        partitions: Sequence[str],
        embedder: Embedder,
        options: Options,
        check: Callable[[], None],
        expected: int | None,
        most_refused: int | None,
        on_progress: Callable[[Progress], None] | None,
        brake: Brake,
    ) -> None:
        self.url, self.column, self.embedder, self.options = url, column, embedder, options
        self.brake = brake
        self.asking = 0
        self.check, self.expected, self.most_refused = check, expected, most_refused
        self.on_progress = on_progress
        self.outcome = Outcome({key: Counts() for key in partitions})
        self.memory = _Memory(column.embedding.dimensions)
        self.most_in_page = max(options.batch_size * 4, 512)
        self.page_rows = self.most_in_page
        self.most_outstanding = max(MOST_OUTSTANDING, 4 * options.batch_size * options.concurrency)
        self.batch = _Batch()
        self.inputs: asyncio.Queue[_Batch | None] = asyncio.Queue(options.concurrency)
        self.writes: asyncio.Queue[list[_Write] | None] = asyncio.Queue(options.concurrency * 2)
        self.flying: dict[UUID, _Waiting] = {}
        self.outstanding = 0
        self.batches_out = 0
        self.settled = asyncio.Condition()
        self.failure: Exception | None = None
        self.too_dear = False
        self.reserved_tokens = 0
        self.reading = ""
        self.started = time.monotonic()

    # ---- reading -----------------------------------------------------------------------------

    async def read(self) -> None:
        """Feed every pending row of every partition, again and again until nothing is left."""
        connection = ReconnectingConnection(self.url)
        try:
            await self._read_passes(connection)
        finally:
            await connection.close()

    async def _read_passes(self, connection: ReconnectingConnection) -> None:
        todo = list(self.outcome.partitions)
        idle = 0
        for _ in range(MOST_PASSES):
            before = self._done()
            locked = self.outcome.total.locked
            todo = [key for key in todo if await self._read_partition(connection, key)]
            await self._send()
            await self._wait_until(lambda: self.outstanding == 0)
            if self.failure or self.outcome.stopped or not todo:
                return
            idle = idle + 1 if self._done() == before else 0
            if idle == MOST_IDLE_PASSES:
                held = self.outcome.total.locked - locked
                self.outcome.stopped = (
                    f"other sessions hold {held} rows; the next run goes on"
                    if held
                    else "rows change faster than they are embedded; the next run goes on"
                )
                return
            if idle:
                await asyncio.sleep(0.2 * 2**idle)
        self.outcome.stopped = "rows keep arriving; the next run goes on"

    def _done(self) -> int:
        total = self.outcome.total
        return total.written + total.quarantined + total.gone

    async def _read_partition(self, connection: ReconnectingConnection, partition: str) -> bool:
        """Hand a partition's pending rows on; True when it had any."""
        self.reading = partition
        position: tuple[str, ...] | None = None
        found = False
        while not (self.failure or self.outcome.stopped):
            self.check()
            if (held := await self.brake.look()) is not None:
                self._halt(held)
                break
            most = self.page_rows
            if self.options.limit is not None:
                most = min(most, self.options.limit - self.outcome.total.read)
            page = await connection.run(
                partial(self._page, partition=partition, position=position, most=max(1, most))
            )
            if not page:
                break
            if most <= 0:
                self.outcome.stopped = f"limit of {self.options.limit} rows reached"
                break
            found = True
            position = page[-1].position
            self._size_pages(page)
            await self._hand_on(partition, page, await self._recall(connection, page))
        return found

    async def _page(
        self,
        connection: "psycopg.AsyncConnection[Any]",
        partition: str,
        position: tuple[str, ...] | None,
        most: int,
    ) -> list[PendingRow]:
        try:
            return await read_page(connection, self.column, partition, position, most)
        except psycopg.DataError as error:
            raise PipelineError(
                f"{self.column}: partition {partition!r} cannot be read: {str(error).strip()}"
            ) from error

    def _size_pages(self, page: list[PendingRow]) -> None:
        """Ask for about as many rows as a page may have bytes, so that none are read in vain."""
        characters = sum(len(row.text or "") for row in page)
        fitting = PAGE_BYTES * len(page) // max(1, characters)
        self.page_rows = max(1, min(self.most_in_page, fitting))

    async def _recall(
        self, connection: ReconnectingConnection, page: list[PendingRow]
    ) -> dict[UUID, Vector]:
        """Vectors that the column has already for these rows' texts, as far as not at hand.

        Of texts that this run has paid for and forgotten; with `reuse: true`, of any.
        """
        memory = self.memory
        memory.page = {row.fingerprint for row in page if row.fingerprint is not None}
        wanted = {
            row.fingerprint
            for row in page
            if row.fingerprint is not None
            and memory.vector(row.fingerprint) is None
            and row.fingerprint not in self.flying
        }
        places: list[tuple[str, ...]] | None = None
        if not self.column.embedding.reuse:
            wanted &= memory.places.keys()
            places = [memory.places[fingerprint] for fingerprint in wanted]
        if not wanted:
            return {}
        fingerprints = list(wanted)
        return await connection.run(lambda c: stored_vectors(c, self.column, fingerprints, places))

    async def _hand_on(
        self, partition: str, page: list[PendingRow], recalled: dict[UUID, Vector]
    ) -> None:
        """Give rows to the writer where nothing is to be embedded, else to the provider."""
        if self.outstanding >= self.most_outstanding:
            await self._send()
            await self._wait_until(lambda: self.outstanding < self.most_outstanding)
        ready: list[_Write] = []
        for row in page:
            fingerprint = row.fingerprint
            if fingerprint is None or row.text is None:
                ready.append(_Write(partition, StagedRow(row.key, None, None), "cleared"))
            elif (error := self.memory.refused.get(fingerprint)) is not None:
                staged = StagedRow(row.key, fingerprint, None)
                ready.append(_Write(partition, staged, "quarantined", error))
            elif (vector := recalled.get(fingerprint)) is not None:
                ready.append(_Write(partition, StagedRow(row.key, fingerprint, vector), "reused"))
            elif (known := self.memory.vector(fingerprint)) is not None:
                ready.append(_Write(partition, StagedRow(row.key, fingerprint, known[0]), known[1]))
            elif fingerprint not in self.memory.given_up:
                await self._embed_later(partition, row.key, fingerprint, row.text)
                continue
            else:
                continue
            self._count_read(partition)
        if ready:
            await self.writes.put(ready)

    def _count_read(self, partition: str) -> None:
        self.outcome.partitions[partition].read += 1
        self.outstanding += 1

    async def _embed_later(
        self, partition: str, key: tuple[str, ...], fingerprint: UUID, text: str
    ) -> None:
        if self.too_dear or self.outcome.held:
            return
        self._count_read(partition)
        waiting = self.flying.get(fingerprint)
        if waiting is None:
            waiting = self.flying[fingerprint] = _Waiting(text, fingerprint)
            self.batch.inputs.append(waiting)
            self.batch.characters += len(text)
        waiting.rows.append((partition, key))
        if (
            len(self.batch.inputs) >= self.options.batch_size
            or self.batch.characters >= BATCH_BYTES
        ):
            await self._send()

    async def _send(self) -> None:
        """Queue the batch that was being filled, as far as its cost may not pass the cap."""
        batch, self.batch = self.batch, _Batch()
        waiting = batch.inputs
        if self.outcome.held:
            await self._abandon(waiting)
            return
        while waiting:
            afforded = await self._affordable(waiting)
            if not afforded.inputs:
                self.too_dear = True
                self.outcome.stopped = f"max_cost of ${self.options.max_cost:g} {TOO_DEAR}"
                await self._abandon(waiting)
                return
            waiting = waiting[len(afforded.inputs) :]
            self.batches_out += 1
            await self.inputs.put(afforded)

    async def _affordable(self, waiting: list[_Waiting]) -> _Batch:
        """As many of these inputs as can be paid for whatever the provider counts.

        What they cost at most is reserved until it is known what they came to. When not even
        half of them fit, that is waited for.
        """
        most, cost = self.options.max_cost, self.embedder.cost
        if most is None or not cost(1_000_000):
            return _Batch(waiting)
        tokens = list(accumulate(self.embedder.most_tokens(each.text) for each in waiting))
        while True:
            spoken_for = self.outcome.tokens + self.reserved_tokens
            fitting = sum(cost(spoken_for + reached) <= most for reached in tokens)
            if 2 * fitting >= len(waiting) or self.batches_out == 0 or self.failure is not None:
                break
            await self._wait_until(partial(self._fewer_out, self.batches_out))
        reserved = tokens[fitting - 1] if fitting else 0
        self.reserved_tokens += reserved
        return _Batch(waiting[:fitting], tokens=reserved)

    def _fewer_out(self, before: int) -> bool:
        return self.batches_out < before

    async def _abandon(self, inputs: Sequence[_Waiting]) -> None:
        """Let rows go without a vector: they stay pending."""
        for waiting in inputs:
            self.flying.pop(waiting.fingerprint, None)
        await self._settle(sum(len(waiting.rows) for waiting in inputs))

    async def _settle(self, rows: int) -> None:
        async with self.settled:
            self.outstanding -= rows
            self.settled.notify_all()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds or the run has failed."""
        async with self.settled:
            await self.settled.wait_for(lambda: condition() or self.failure is not None)

    async def _fail(self, error: Exception) -> None:
        async with self.settled:
            if self.failure is None:
                self.failure = error
            self.settled.notify_all()

    # ---- embedding ---------------------------------------------------------------------------

    async def embed(self) -> None:
        """Take batches until there are none; one of several such workers."""
        while (batch := await self.inputs.get()) is not None:
            try:
                await self._embed(batch)
            except Exception as error:  # noqa: BLE001 - handed to `run`, which raises it
                await self._fail(error)

    async def _embed(self, batch: _Batch) -> None:
        reservation = None
        if self.failure is None and self.outcome.held is None:
            reservation = await self._reserve(batch)
        if reservation is None:
            self.reserved_tokens -= batch.tokens
            self.batches_out -= 1
            await self._abandon(batch.inputs)
            return
        self.asking += 1
        cost = 0.0
        try:
            result = await self.embedder.embed([item.text for item in batch.inputs])
            cost = self.embedder.cost(result.tokens)
        except EmbedError as error:
            if error.partial is not None:
                cost = self.embedder.cost(error.partial.tokens)
                await self._take(batch, error.partial)
            raise
        finally:
            self.asking -= 1
            self.brake.settle(reservation, cost)
        await self._take(batch, result)

    async def _reserve(self, batch: _Batch) -> Reservation | None:
        """Leave to send a batch; None when a brake, or a failure meanwhile, stops the run.

        What requests in flight turn out not to cost may make room for it, so they are waited for.
        """
        most = 0.0
        if self.embedder.cost(1_000_000):
            tokens = sum(self.embedder.most_tokens(waiting.text) for waiting in batch.inputs)
            most = self.embedder.cost(tokens)
        while self.failure is None and self.outcome.held is None:
            try:
                return await self.brake.reserve(most)
            except BrakedError as braked:
                if not braked.may_ease:
                    self._halt(braked.held)
                elif self.asking:
                    await self._wait_until(partial(self._fewer_asking, self.asking))
        return None

    def _fewer_asking(self, before: int) -> bool:
        return self.asking < before

    def _halt(self, held: Held) -> None:
        """Send and read nothing more; what is in flight is still written."""
        self.outcome.held = held
        self.outcome.stopped = held.reason

    async def _take(self, batch: _Batch, result: EmbedResult) -> None:
        """Hand vectors and refusals to the writer; what is neither stays pending."""
        self._account(batch, result)
        truncated = set(result.truncated)
        writes: list[_Write] = []
        unfinished: list[_Waiting] = []
        for index, waiting in enumerate(batch.inputs):
            self.flying.pop(waiting.fingerprint, None)
            if (error := result.refused.get(index)) is not None:
                self.memory.refused[waiting.fingerprint] = error
                writes += [
                    _Write(key, StagedRow(row, waiting.fingerprint, None), "quarantined", error)
                    for key, row in waiting.rows
                ]
            elif result.done[index]:
                # a copy: a view would keep the whole response alive for as long as one row is
                vector = np.array(result.vectors[index], dtype=np.float32)
                self.memory.unwritten.add(waiting.fingerprint)
                self.memory.keep(waiting.fingerprint, vector)
                for number, (key, row) in enumerate(waiting.rows):
                    self.outcome.partitions[key].truncated += index in truncated
                    staged = StagedRow(row, waiting.fingerprint, vector)
                    writes.append(_Write(key, staged, "reused" if number else "embedded"))
            else:
                unfinished.append(waiting)
        if writes:
            await self.writes.put(writes)
        await self._abandon(unfinished)

    def _account(self, batch: _Batch, result: EmbedResult) -> None:
        outcome = self.outcome
        outcome.tokens += result.tokens
        outcome.requests += result.requests
        outcome.throttled += result.throttled
        outcome.retried += result.retried
        outcome.cost = self.embedder.cost(outcome.tokens)
        self.reserved_tokens -= batch.tokens
        self.batches_out -= 1

    # ---- writing -----------------------------------------------------------------------------

    async def write(self) -> None:
        """Write what is ready, in batches of the adaptive size, until there is no more.

        After an error of its own it goes on taking, so that nobody waits for it.
        """
        writer = Writer(self.column)
        connection = ReconnectingConnection(self.url)
        failed = False
        try:
            async for batch in self._ready(writer):
                if failed:
                    continue
                try:
                    self.check()
                    await self._write_batch(connection, writer, batch)
                except Exception as error:  # noqa: BLE001 - handed to `run`, which raises it
                    failed = True
                    await self._fail(error)
        finally:
            await connection.close()

    async def _ready(self, writer: Writer) -> AsyncIterator[list[_Write]]:
        ready: list[_Write] = []
        ended = False
        while ready or not ended:
            while not ended and (
                not ready or (len(ready) < writer.batch_rows and not self.writes.empty())
            ):
                taken = await self.writes.get()
                ended = taken is None
                ready += taken or []
            if ready:
                batch, ready = ready[: writer.batch_rows], ready[writer.batch_rows :]
                yield batch

    async def _write_batch(
        self, connection: ReconnectingConnection, writer: Writer, batch: list[_Write]
    ) -> None:
        refused = [item for item in batch if item.error]
        rows = [item for item in batch if not item.error]
        if rows:
            staged = [item.row for item in rows]
            self._count(rows, await connection.run(lambda c: writer.write(c, staged)))
        if refused:
            await self._quarantine(connection, refused)
        await self._settle(len(batch))

    async def _quarantine(self, connection: ReconnectingConnection, batch: list[_Write]) -> None:
        refusals = [
            Refusal(item.row.key, item.row.fingerprint, item.error)
            for item in batch
            if item.row.fingerprint is not None
        ]
        await connection.run(lambda c: quarantine(c, self.column, refusals))
        for item in batch:
            self.outcome.partitions[item.partition].quarantined += 1
        total = self.outcome.total.quarantined
        if self.most_refused is not None and total > self.most_refused:
            await self._fail(
                PipelineError(
                    f"{self.column}: the provider refused {total} rows, which brings the "
                    "quarantined ones past max_quarantined_share; the latest says: "
                    f"{batch[-1].error}"
                )
            )

    def _count(self, batch: list[_Write], result: Written) -> None:
        for position, item in enumerate(batch):
            counts = self.outcome.partitions[item.partition]
            row = item.row
            if row.fingerprint is not None:
                self.memory.unwritten.discard(row.fingerprint)
            if position in result.written:
                setattr(counts, item.kind, getattr(counts, item.kind) + 1)
                if row.fingerprint is not None:
                    self.memory.written(row.fingerprint, row.key)
            elif position in result.locked:
                counts.locked += 1
                if row.vector is not None and row.fingerprint is not None:
                    # still wanted, and paid for: the next pass finds it here
                    self.memory.keep_locked(row.fingerprint, row.vector, item.kind)
            elif position in result.superseded:
                counts.superseded += 1
            else:
                counts.gone += 1

    # ---- the whole ---------------------------------------------------------------------------

    async def report(self) -> None:
        """Say where the run stands every few seconds."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self._report()

    def _report(self) -> None:
        if self.on_progress is None:
            return
        total = self.outcome.total
        elapsed = time.monotonic() - self.started
        rate = total.written / elapsed if elapsed else 0.0
        remaining = None
        if self.expected is not None:
            most = min(self.expected, self.options.limit or self.expected)
            remaining = max(0, most - self._done())
        eta = remaining / rate if remaining is not None and rate > 0 else None
        self.on_progress(Progress(total.written, rate, remaining, eta))

    async def run(self) -> Outcome:
        reporter = asyncio.create_task(self.report())
        workers = [asyncio.create_task(self.embed()) for _ in range(self.options.concurrency)]
        writer = asyncio.create_task(self.write())
        try:
            try:
                await self.read()
            except Exception as error:  # noqa: BLE001 - raised below, after the queues drained
                await self._fail(error)
            for _ in workers:
                await self.inputs.put(None)
            await asyncio.gather(*workers)
            await self.writes.put(None)
            await writer
        finally:
            for task in (reporter, writer, *workers):
                task.cancel()
            await asyncio.gather(reporter, writer, *workers, return_exceptions=True)
            await self.brake.close()
            self.outcome.seconds = time.monotonic() - self.started
        self._report()
        if self.failure is not None:
            raise BackfillError(self._where(self.failure), self.outcome) from self.failure
        return self.outcome

    def _where(self, failure: Exception) -> str:
        """A failure in words, with where it stopped the run."""
        said = str(failure).strip() or type(failure).__name__
        total = self.outcome.total
        where = f" in partition {self.reading}" if self.reading else ""
        return (
            f"{said}\n{self.column}: stopped{where} after {total.read:,} rows were read and "
            f"{total.written:,} written"
        )


async def backfill(
    url: str,
    column: Column,
    partitions: Sequence[str],
    embedder: Embedder,
    options: Options | None = None,
    *,
    check: Callable[[], None] = lambda: None,
    expected: int | None = None,
    most_refused: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    brake: Brake | None = None,
) -> Outcome:
    """Bring the pending rows of some partitions of a column up to date.

    Args:
        url: Postgres connection string; two connections are used, and the brake's.
        column: the column, bound to its table.
        partitions: partition keys; rows of others are not touched.
        embedder: gives float32 vectors of the column's width; started already, closed by the
            caller.
        check: called before each page and each write; what it raises stops the run.
        expected: how many rows are pending, for the progress report.
        most_refused: the run stops once it has quarantined more rows than this.
        on_progress: called every `PROGRESS_SECONDS` and at the end.
        brake: asked before each page and each request; once it holds the run back, nothing more
            is sent, what is in flight is written, and `Outcome.held` says why.

    Raises BackfillError when the run had to stop (the provider gave up, the database went away,
    the lease was lost): everything finished by then is written, and the error carries its counts.
    """
    run = _Run(
        url,
        column,
        partitions,
        embedder,
        options or Options(),
        check,
        expected,
        most_refused,
        on_progress,
        brake or NoBrake(),
    )
    return await run.run()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
