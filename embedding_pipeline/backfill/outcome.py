"""What a run may do, what it did, and where it stands."""

from dataclasses import dataclass, fields

from embedding_pipeline.brakes import Held
from embedding_pipeline.errors import PipelineError

TOO_DEAR = "would be passed"
"""In `Outcome.stopped` of a run that its cost cap ended."""


@dataclass(frozen=True)
class Options:
    """What a run may do. `limit` rows and `max_cost` US dollars are never passed.

    `concurrency` is the most batches in flight: sent to the provider and not yet written to the
    table. A place is free again when its batch's rows are written, so that a run that is killed
    has sent at most `concurrency * batch_size` texts whose vectors are not in the table.
    """

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

    @property
    def done(self) -> int:
        """Rows that are not pending any more."""
        return self.written + self.quarantined + self.gone


@dataclass
class Outcome:
    """What a run did, whether or not it reached the end."""

    partitions: dict[str, Counts]
    tokens: int = 0
    """As the provider counted them."""
    unconfirmed_tokens: int = 0
    """At most so many more may have been billed: requests that were sent and brought no usable
    answer (a timeout, a reset, half a response). In `max_cost`, not in `cost`."""
    requests: int = 0
    throttled: int = 0
    retried: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    stopped: str | None = None
    """Why the run ended before its partitions were empty; None when it did not."""
    swept: bool = False
    """Every row that was pending when the run began has been dealt with: what is pending now
    became so later."""
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
