"""What the stages of a run share: the rows on their way, who waits for what, the first failure."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from embedding_pipeline.backfill.memory import Memory
from embedding_pipeline.backfill.outcome import Counts, Options, Outcome
from embedding_pipeline.brakes import Brake, Held
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.writer import StagedRow

MOST_OUTSTANDING = 8192
"""Rows between reader and table: a text that a million rows share is one input only."""


@dataclass(slots=True)
class Waiting:
    """An input on its way to the provider and the rows (partition, key) that wait for it."""

    text: str
    fingerprint: bytes
    rows: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """Inputs of one request, and the tokens that are reserved for it under a cost cap."""

    inputs: list[Waiting] = field(default_factory=list)
    characters: int = 0
    tokens: int = 0
    unwritten: int = 0
    """Rows that the provider has answered for and that are not in the table yet."""


class Write(NamedTuple):
    """A row for the table: with a vector, to be cleared, or (with an error) to quarantine."""

    partition: str
    row: StagedRow
    kind: str
    """The count in `Counts` that it adds to when it is done."""
    error: str = ""
    batch: Batch | None = None
    """The request that it came from."""


class Flow:
    """One run's state, for one event loop."""

    def __init__(
        self,
        column: Column,
        partitions: Sequence[str],
        options: Options,
        check: Callable[[], None],
        brake: Brake,
    ) -> None:
        self.column, self.options, self.check, self.brake = column, options, check, brake
        self.outcome = Outcome({key: Counts() for key in partitions})
        self.memory = Memory(column.embedding.dimensions)
        self.writes: asyncio.Queue[list[Write] | None] = asyncio.Queue(options.concurrency * 2)
        self.flying: dict[bytes, Waiting] = {}
        """Texts between reader and provider's answer: another row of the same text joins them."""
        self.outstanding = 0
        """Rows that were handed on and of which it is not known yet what became of them."""
        self.most_outstanding = max(MOST_OUTSTANDING, 4 * options.batch_size * options.concurrency)
        self.failure: Exception | None = None
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    @property
    def ending(self) -> bool:
        """No further rows are to be read."""
        return self.failure is not None or self.outcome.stopped is not None

    def halt(self, held: Held) -> None:
        """Send and read nothing more; what is in flight is still written."""
        self.outcome.held = held
        self.outcome.stopped = held.reason

    def count_read(self, partition: str) -> None:
        self.outcome.partitions[partition].read += 1
        self.outstanding += 1

    def settle(self, rows: int) -> None:
        """It is known what became of so many rows."""
        self.outstanding -= rows
        self._wake()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds or the run has failed; looked at whenever rows settle."""
        while not condition() and self.failure is None:
            woken = asyncio.get_running_loop().create_future()
            self._waiting.append((condition, woken))
            await woken

    def fail(self, error: Exception) -> None:
        """The first failure is the run's."""
        if self.failure is None:
            self.failure = error
        self._wake()

    def _wake(self) -> None:
        """Only those whose condition holds: as many wait as there are batches in flight."""
        still: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        for condition, woken in self._waiting:
            if woken.done():
                continue  # cancelled
            if self.failure is not None or condition():
                woken.set_result(None)
            else:
                still.append((condition, woken))
        self._waiting = still
