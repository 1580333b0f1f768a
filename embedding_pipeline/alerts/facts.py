"""What the rules look at: the present state of columns, runs, checks, ticks and providers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedding_pipeline.evaluation.verdict import Verdict


@dataclass(frozen=True)
class FailingPartition:
    """A pending partition whose last attempt failed."""

    partition: str
    failures: int
    """In a row."""
    seconds_ago: float
    run_id: str | None
    error: str


@dataclass(frozen=True)
class ColumnFacts:
    """One embedding column now."""

    table: str
    column: str
    asset: str
    """Its asset key as a path, for links."""
    provider: str
    stopped: str | None = None
    """Why nothing may be done to it: another recipe, a table that is gone."""
    unknown: str | None = None
    """Why it could not be looked at; nothing below holds then."""
    coverage: "Verdict | None" = None
    """What the `coverage` check would say now."""
    pending: int = 0
    pending_since: datetime | None = None
    partitions: frozenset[str] = frozenset()
    """That have pending rows."""
    failing: Sequence[FailingPartition] = ()
    held: str | None = None
    """What holds it back on purpose: a pause, a daily cost cap."""
    index_missing: str | None = None
    """Why search has no usable HNSW index; None while one is there, or being built."""

    @property
    def name(self) -> str:
        return f"{self.table}.{self.column}"


@dataclass(frozen=True)
class CheckFacts:
    """The latest result of a check that was a judgement; "not evaluated" is none."""

    table: str
    column: str
    asset: str
    check: str
    known: bool
    """False where the check has never been evaluated."""
    failed: bool = False
    """With severity ERROR; a warning never alerts."""
    summary: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    at: datetime | None = None
    unjudged: str | None = None
    """Why its latest result is no judgement, where that does not pass by itself: what the golden
    set expects is gone."""

    @property
    def name(self) -> str:
        return f"{self.table}.{self.column}"


@dataclass(frozen=True)
class FailedRun:
    """A run that failed and what has become of its work."""

    run_id: str
    work: str
    """What it was to do, as a person would say it; the same for the next try."""
    error: str
    at: datetime
    died: bool
    """Killed, timed out or with its machine gone, rather than failed by itself."""
    recovered: bool
    """Its work has been done since."""
    new: bool
    """Nobody has been told of it yet."""
    retried: bool
    """The table's sensor asks for it again, or somebody ended it: one failure is no news yet."""
    counted: bool = False
    """Its columns' failures are counted partition by partition (`ColumnFacts.failing`)."""
    table: str | None = None
    columns: frozenset[str] = frozenset()
    """`table.column` of the embedding columns it was to fill."""


@dataclass(frozen=True)
class TickFacts:
    """A sensor or schedule and how its ticks go."""

    name: str
    is_schedule: bool
    wanted: bool
    """It should be running: by default, or because it once was."""
    running: bool
    silent_seconds: float | None
    """Since its last tick, None before the first one; of a schedule since the due time that it
    has missed, 0 if it has missed none."""
    quiet_seconds: float
    """How long it may be silent."""
    link: str
    """Path in the Dagster UI."""
    failures: int = 0
    """Failed ticks in a row, the latest ones."""
    error: str = ""
    table: str | None = None
    columns: frozenset[str] = frozenset()
    """`table.column` that it cares for."""


@dataclass(frozen=True)
class ProviderFacts:
    """A provider that somebody waits for, and what a trial request to it said."""

    name: str
    error: str | None
    """None: it answers."""
    final: bool = False
    """Asking again would be answered alike: a wrong key, an unknown model, a used-up quota."""
    waiting: frozenset[str] = frozenset()
    """`table.column` that it fills and that have pending rows."""
    rows: int = 0
    """Pending in them."""
    unknown: bool = False
    """It was busy (429) or could not be asked."""


@dataclass(frozen=True)
class CapFacts:
    """A daily cost cap that is reached."""

    subject: str
    """The provider, or `all providers`."""
    spent: float
    cap: float
    """US dollars a day."""
    resets_at: datetime
    waiting: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ChannelFacts:
    """A channel that has refused its latest messages."""

    channel: str
    error: str
    waiting: int
    """Messages that it has not taken."""
    since: datetime
