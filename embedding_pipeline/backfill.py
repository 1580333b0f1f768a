"""The backfill core: pending → embed → write, overlapped, with flat memory. Plain asyncio.

    reader ──rows──▶ batches ──▶ embed workers ──vectors──▶ writer

Assets, the command line and tests call `backfill`; nothing here knows Dagster. Rows of several
partitions share batches, so that a thousand small partitions cost no more than one large one.
The queues between the stages are bounded, which is what keeps memory flat.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import psycopg

from embedding_pipeline.embedders import Embedder, EmbedError, EmbedResult
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import DatabaseUnreachableError, open_async
from embedding_pipeline.store.pending import PendingRow, read_page
from embedding_pipeline.store.quarantine import Refusal, json_key, quarantine
from embedding_pipeline.store.writer import StagedRow, Writer, Written, reuse_query

REMEMBERED_VECTORS = 2048
"""Recent vectors kept for equal texts and for rows that were locked (12 MB at 1536)."""
MOST_PASSES = 8
"""How often a run re-reads its partitions for rows that arrived or were locked meanwhile."""
RECONNECT_SECONDS = 60.0
PROGRESS_SECONDS = 0.5
REFUSALS_ALWAYS_ALLOWED = 20
"""Below this many a share says nothing: one bad row in a table of ten is 10 %."""

Result = TypeVar("Result")


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
    """An input on its way to the provider and the rows that wait for its vector."""

    text: str
    fingerprint: UUID
    rows: list[tuple[str, PendingRow]] = field(default_factory=list)


@dataclass
class _Batch:
    """Inputs of one request and what they are estimated to cost, in US dollars."""

    inputs: list[_Waiting] = field(default_factory=list)
    estimate: float = 0.0


@dataclass(frozen=True)
class _Write:
    partition: str
    row: StagedRow
    kind: str


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
        on_progress: Callable[[Progress], None] | None,
        on_partition: Callable[[str, Counts], None] | None,
        most_refused: int | None,
    ) -> None:
        self.url, self.column, self.embedder, self.options = url, column, embedder, options
        self.check, self.expected = check, expected
        self.on_progress, self.on_partition = on_progress, on_partition
        self.most_refused = most_refused
        self.outcome = Outcome({key: Counts() for key in partitions})
        self.batch = _Batch()
        self.inputs: asyncio.Queue[_Batch | None] = asyncio.Queue(options.concurrency)
        self.writes: asyncio.Queue[list[_Write] | None] = asyncio.Queue(options.concurrency * 2)
        self.flying: dict[UUID, _Waiting] = {}
        self.known: OrderedDict[UUID, np.ndarray[Any, np.dtype[np.float32]]] = OrderedDict()
        self.outstanding = 0
        self.settled = asyncio.Condition()
        self.failure: BaseException | None = None
        self.reserved_cost = 0.0
        self.started = time.monotonic()

    # ---- reading -----------------------------------------------------------------------------

    async def read(self) -> None:
        """Feed every pending row of every partition, again and again until nothing is left."""
        todo = list(self.outcome.partitions)
        connection = _Connection(self.url)
        stalled = 0
        try:
            for _ in range(MOST_PASSES):
                before = self.outcome.total.written
                found = [key for key in todo if await self._read_partition(connection, key)]
                await self._send()
                await self._drained()
                if self.failure or self.outcome.stopped or not found:
                    return
                todo = found
                if self.outcome.total.written == before:
                    stalled += 1
                    if stalled > 2:
                        return
                    await asyncio.sleep(0.2 * 2**stalled)
            if todo:
                self.outcome.stopped = "rows keep arriving; the next run goes on"
        finally:
            await connection.close()

    async def _read_partition(self, connection: "_Connection", key: str) -> bool:
        """Hand a partition's pending rows on; True when it had any."""
        counts = self.outcome.partitions[key]
        position: tuple[str, ...] | None = None
        found = False
        while not (self.failure or self.outcome.stopped):
            self.check()
            most = max(self.options.batch_size * 4, 512)
            if self.options.limit is not None:
                most = min(most, self.options.limit - self.outcome.total.read)
                if most <= 0:
                    self.outcome.stopped = f"limit of {self.options.limit} rows reached"
                    break
            page = await connection.run(partial(self._page, key, position, most))
            if not page:
                break
            found = True
            counts.read += len(page)
            position = page[-1].position
            for row in await self._reuse(connection, key, page):
                await self._hand_on(key, row)
        return found

    async def _page(
        self,
        key: str,
        position: tuple[str, ...] | None,
        most: int,
        connection: "psycopg.AsyncConnection[Any]",
    ) -> list[PendingRow]:
        return await read_page(connection, self.column, key, position, most)

    async def _reuse(
        self, connection: "_Connection", key: str, page: list[PendingRow]
    ) -> list[PendingRow]:
        """With `reuse: true`, copy vectors that the column already has for equal texts."""
        if not self.column.embedding.reuse:
            return page
        rows = [row for row in page if row.fingerprint is not None]
        parameters = [[json_key(row.key) for row in rows], [row.fingerprint for row in rows]]

        async def copy(c: "psycopg.AsyncConnection[Any]") -> set[int]:
            cursor = await c.execute(reuse_query(self.column), parameters)
            return {position - 1 for (position,) in await cursor.fetchall()}

        done = {rows[position].key for position in await connection.run(copy)}
        self.outcome.partitions[key].reused += len(done)
        return [row for row in page if row.key not in done]

    async def _hand_on(self, key: str, row: PendingRow) -> None:
        self.outstanding += 1
        if row.fingerprint is None or row.text is None:
            await self.writes.put([_Write(key, StagedRow(row.key, None, None), "cleared")])
            return
        vector = self.known.get(row.fingerprint)
        if vector is not None:
            self.known.move_to_end(row.fingerprint)
            staged = StagedRow(row.key, row.fingerprint, vector)
            await self.writes.put([_Write(key, staged, "reused")])
            return
        waiting = self.flying.get(row.fingerprint)
        if waiting is None:
            waiting = self.flying[row.fingerprint] = _Waiting(row.text, row.fingerprint)
            self.batch.inputs.append(waiting)
        waiting.rows.append((key, row))
        if len(self.batch.inputs) >= self.options.batch_size:
            await self._send()

    async def _send(self) -> None:
        """Queue the batch that was being filled, unless its cost would pass the cap."""
        batch, self.batch = self.batch, _Batch()
        if not batch.inputs:
            return
        if self.options.max_cost is not None:
            tokens = sum(self.embedder.estimate_tokens(item.text) for item in batch.inputs)
            batch.estimate = self.embedder.cost(tokens)
            spent = self.outcome.cost + self.reserved_cost
            if spent + batch.estimate > self.options.max_cost:
                self.outcome.stopped = f"max_cost of ${self.options.max_cost:g} would be passed"
                await self._abandon(batch.inputs)
                return
            self.reserved_cost += batch.estimate
        await self.inputs.put(batch)

    async def _abandon(self, inputs: Sequence[_Waiting]) -> None:
        """Let rows go without a vector: they stay pending."""
        for waiting in inputs:
            self.flying.pop(waiting.fingerprint, None)
        await self._settle(sum(len(waiting.rows) for waiting in inputs))

    async def _settle(self, rows: int) -> None:
        async with self.settled:
            self.outstanding -= rows
            self.settled.notify_all()

    async def _drained(self) -> None:
        async with self.settled:
            await self.settled.wait_for(lambda: self.outstanding == 0 or self.failure is not None)

    # ---- embedding ---------------------------------------------------------------------------

    async def embed(self) -> None:
        """Take batches until there are none; one of several such workers."""
        while (batch := await self.inputs.get()) is not None:
            if self.failure is not None:
                await self._abandon(batch.inputs)
                continue
            try:
                result = await self.embedder.embed([item.text for item in batch.inputs])
            except EmbedError as error:
                if error.partial is not None:
                    await self._take(batch, error.partial)
                else:
                    await self._abandon(batch.inputs)
                await self._fail(error)
            except Exception as error:  # noqa: BLE001 - handed to `run`, which raises it
                await self._abandon(batch.inputs)
                await self._fail(error)
            else:
                await self._take(batch, result)

    async def _take(self, batch: _Batch, result: EmbedResult) -> None:
        """Hand vectors to the writer, refusals to quarantine; what is neither stays pending."""
        outcome = self.outcome
        outcome.tokens += result.tokens
        outcome.requests += result.requests
        outcome.throttled += result.throttled
        outcome.retried += result.retried
        outcome.cost += self.embedder.cost(result.tokens)
        self.reserved_cost -= batch.estimate
        truncated = set(result.truncated)
        writes: list[_Write] = []
        refusals: list[Refusal] = []
        unfinished: list[_Waiting] = []
        for index, waiting in enumerate(batch.inputs):
            self.flying.pop(waiting.fingerprint, None)
            if (error := result.refused.get(index)) is not None:
                for key, row in waiting.rows:
                    outcome.partitions[key].quarantined += 1
                    refusals.append(Refusal(row.key, waiting.fingerprint, error))
                continue
            if not result.done[index]:
                unfinished.append(waiting)
                continue
            # a copy: a view would keep the whole response alive for as long as one row is known
            vector = np.array(result.vectors[index], dtype=np.float32)
            self._remember(waiting.fingerprint, vector)
            for number, (key, row) in enumerate(waiting.rows):
                outcome.partitions[key].truncated += index in truncated
                kind = "embedded" if number == 0 else "reused"
                writes.append(_Write(key, StagedRow(row.key, row.fingerprint, vector), kind))
        if writes:
            await self.writes.put(writes)
        if unfinished:
            await self._abandon(unfinished)
        if refusals:
            await self._quarantine(refusals)

    async def _quarantine(self, refusals: list[Refusal]) -> None:
        connection = _Connection(self.url)
        try:
            await connection.run(lambda c: quarantine(c, self.column, refusals))
        finally:
            await connection.close()
        await self._settle(len(refusals))
        total = self.outcome.total.quarantined
        if self.most_refused is not None and total > max(
            self.most_refused, REFUSALS_ALWAYS_ALLOWED
        ):
            await self._fail(
                PipelineError(
                    f"{self.column}: the provider refused {total} rows, more than "
                    f"max_quarantined_share allows; the latest says: {refusals[-1].error}"
                )
            )

    def _remember(self, fingerprint: UUID, vector: "np.ndarray[Any, np.dtype[np.float32]]") -> None:
        self.known[fingerprint] = vector
        self.known.move_to_end(fingerprint)
        while len(self.known) > REMEMBERED_VECTORS:
            self.known.popitem(last=False)

    async def _fail(self, error: BaseException) -> None:
        async with self.settled:
            if self.failure is None:
                self.failure = error
            self.settled.notify_all()

    # ---- writing -----------------------------------------------------------------------------

    async def write(self) -> None:
        """Gather what is ready into batches of the adaptive size and write them."""
        writer = Writer(self.column)
        connection = _Connection(self.url)
        ready: list[_Write] = []
        ended = False
        try:
            while not ended or ready:
                if not ready and not ended:
                    taken = await self.writes.get()
                    if taken is None:
                        ended = True
                        continue
                    ready += taken
                while len(ready) < writer.batch_rows and not self.writes.empty():
                    taken = self.writes.get_nowait()
                    if taken is None:
                        ended = True
                        break
                    ready += taken
                batch, ready = ready[: writer.batch_rows], ready[writer.batch_rows :]
                if batch:
                    await self._write_batch(connection, writer, batch)
        except Exception as error:  # noqa: BLE001 - handed to `run`, which raises it
            await self._fail(error)
            # the reader and the embedders must not wait for a writer that is gone
            while not ended:
                ended = await self.writes.get() is None
        finally:
            await connection.close()

    async def _write_batch(
        self, connection: "_Connection", writer: Writer, batch: list[_Write]
    ) -> None:
        self.check()
        counts = await connection.run(lambda c: writer.write(c, [item.row for item in batch]))
        self._count(batch, counts)
        await self._settle(len(batch))

    def _count(self, batch: list[_Write], result: Written) -> None:
        for position, item in enumerate(batch):
            counts = self.outcome.partitions[item.partition]
            if position in result.written:
                setattr(counts, item.kind, getattr(counts, item.kind) + 1)
            elif position in result.locked:
                counts.locked += 1
                if item.row.vector is not None and item.row.fingerprint is not None:
                    # still wanted, and paid for: the next pass finds it here
                    self._remember(item.row.fingerprint, item.row.vector)
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
        done = total.written
        elapsed = time.monotonic() - self.started
        rate = done / elapsed if elapsed else 0.0
        remaining = None
        if self.expected is not None:
            most = min(self.expected, self.options.limit or self.expected)
            remaining = max(0, most - done - total.quarantined - total.gone)
        eta = remaining / rate if remaining is not None and rate > 0 else None
        self.on_progress(Progress(done, rate, remaining, eta))

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
            reporter.cancel()
            for task in [*workers, writer]:
                task.cancel()
            await asyncio.gather(reporter, writer, *workers, return_exceptions=True)
            self.outcome.seconds = time.monotonic() - self.started
        if self.on_partition is not None:
            for key, counts in self.outcome.partitions.items():
                self.on_partition(key, counts)
        self._report()
        if self.failure is not None:
            message = str(self.failure) or type(self.failure).__name__
            raise BackfillError(message, self.outcome) from self.failure
        return self.outcome


class _Connection:
    """A connection that is opened anew when the server goes away, and retries what is harmless.

    Every operation given to it may be repeated: reads, compare-and-swap writes and upserts.
    Serialisation failures (40001) and deadlocks (40P01) are transient too.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def run(
        self, operation: Callable[["psycopg.AsyncConnection[Any]"], Awaitable[Result]]
    ) -> Result:
        deadline = time.monotonic() + RECONNECT_SECONDS
        pause = 0.05
        while True:
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = await open_async(self._url)
                return await operation(self._connection)
            except (
                DatabaseUnreachableError,
                psycopg.OperationalError,
                psycopg.InterfaceError,
            ) as error:
                if time.monotonic() + pause > deadline or _is_final(error):
                    raise
                if self._connection is not None and self._connection.broken:
                    await self.close()
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None


def _is_final(error: Exception) -> bool:
    """Operational errors that waiting does not mend."""
    return isinstance(
        error,
        psycopg.errors.DiskFull | psycopg.errors.ConfigurationLimitExceeded,
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
    on_partition: Callable[[str, Counts], None] | None = None,
) -> Outcome:
    """Bring the pending rows of some partitions of a column up to date.

    Args:
        url: Postgres connection string; three connections are used at most.
        column: the column, bound to its table.
        partitions: partition keys; rows of others are not touched.
        embedder: gives float32 vectors of the column's width; started already, closed by the
            caller.
        check: called before each page and each write; what it raises stops the run.
        expected: how many rows are pending, for the progress report.
        most_refused: the run stops once the provider has refused more rows than this.
        on_progress: called every `PROGRESS_SECONDS` and at the end.
        on_partition: called with each partition's counts at the end.

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
        on_progress,
        on_partition,
        most_refused,
    )
    return await run.run()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
