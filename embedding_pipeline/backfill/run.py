"""One run: its stages side by side, from the first row to the outcome."""

import asyncio
import time
from collections.abc import Callable, Sequence

from embedding_pipeline.backfill.flow import Flow
from embedding_pipeline.backfill.outcome import BackfillError, Options, Outcome, Progress
from embedding_pipeline.backfill.reading import Reader
from embedding_pipeline.backfill.recording import WRITERS, Recorder
from embedding_pipeline.backfill.sending import Sender
from embedding_pipeline.brakes import Brake, NoBrake
from embedding_pipeline.embedders import Embedder
from embedding_pipeline.store.column import Column

PROGRESS_SECONDS = 0.5


class _Run:
    def __init__(
        self,
        flow: Flow,
        reader: Reader,
        sender: Sender,
        recorder: Recorder,
        expected: int | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.flow, self.reader, self.sender, self.recorder = flow, reader, sender, recorder
        self.expected, self.on_progress = expected, on_progress
        self.started = time.monotonic()

    async def run(self) -> Outcome:
        flow = self.flow
        reporter = asyncio.create_task(self._report_now_and_then())
        workers = [asyncio.create_task(self.sender.work()) for _ in range(flow.options.concurrency)]
        recorders = [asyncio.create_task(self.recorder.write()) for _ in range(WRITERS)]
        try:
            try:
                await self.reader.read()
            except Exception as error:  # noqa: BLE001 - raised below, after the queues drained
                flow.fail(error)
            await self.sender.end(len(workers))
            await asyncio.gather(*workers)
            for _ in recorders:
                await flow.writes.put(None)
            await asyncio.gather(*recorders)
        finally:
            for task in (reporter, *recorders, *workers):
                task.cancel()
            await asyncio.gather(reporter, *recorders, *workers, return_exceptions=True)
            await flow.brake.close()
            flow.outcome.seconds = time.monotonic() - self.started
        self._report()
        if flow.failure is not None:
            raise BackfillError(self._where(flow.failure), flow.outcome) from flow.failure
        return flow.outcome

    async def _report_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self._report()

    def _report(self) -> None:
        if self.on_progress is None:
            return
        total = self.flow.outcome.total
        elapsed = time.monotonic() - self.started
        rate = total.written / elapsed if elapsed else 0.0
        remaining = None
        if self.expected is not None:
            most = min(self.expected, self.flow.options.limit or self.expected)
            remaining = max(0, most - total.done)
        eta = remaining / rate if remaining is not None and rate > 0 else None
        self.on_progress(Progress(total.written, rate, remaining, eta))

    def _where(self, failure: Exception) -> str:
        """A failure in words, with where it stopped the run."""
        said = str(failure).strip() or type(failure).__name__
        total = self.flow.outcome.total
        where = f" in partition {self.reader.reading}" if self.reader.reading else ""
        return (
            f"{said}\n{self.flow.column}: stopped{where} after {total.read:,} rows were read and "
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
        url: Postgres connection string; one connection reads and `WRITERS` write, and the brake
            has its own.
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
    flow = Flow(column, partitions, options or Options(), check, brake or NoBrake())
    sender = Sender(flow, embedder)
    reader, recorder = Reader(url, flow, sender), Recorder(url, flow, most_refused)
    return await _Run(flow, reader, sender, recorder, expected, on_progress).run()
