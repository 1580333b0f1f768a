"""What the rules find: problems, each with the words that a person needs at night."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class Kind(StrEnum):
    """What sort of thing is wrong; with the subject it identifies an incident."""

    CHECK = "check"
    """An asset check failed with severity ERROR. Subject: `table.column: check`."""
    QUARANTINE = "quarantine"
    """Too many rows refused. Subject: `table.column`."""
    RUN = "run"
    """A run failed or died. Subject: what it was to do."""
    COLUMN = "column"
    """A column or table whose work is stopped: another recipe, a table that is gone."""
    SENSOR = "sensor"
    SCHEDULE = "schedule"
    PROVIDER = "provider"
    """A provider does not answer, or refuses us. Subject: its name."""
    COST_CAP = "cost cap"
    """A daily cap on spending is reached. Subject: the provider, or `all providers`."""
    CHANNEL = "alert channel"
    """A channel of ALERT_URLS does not take alerts; told through the others."""
    DATABASE = "database"


EXPLAINS: Mapping[Kind, frozenset[Kind]] = {
    Kind.DATABASE: frozenset(Kind),
    Kind.COLUMN: frozenset({Kind.RUN, Kind.SENSOR, Kind.CHECK}),
    Kind.PROVIDER: frozenset({Kind.RUN, Kind.CHECK}),
    Kind.COST_CAP: frozenset({Kind.RUN, Kind.CHECK}),
    Kind.QUARANTINE: frozenset({Kind.RUN}),
    Kind.RUN: frozenset({Kind.RUN, Kind.CHECK}),
    Kind.SENSOR: frozenset({Kind.CHECK}),
}
"""Which kinds of problem are consequences of which; of checks only `coverage` ever is."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong now."""

    kind: Kind
    subject: str
    summary: str
    """What was found, in a sentence."""
    remedy: str
    """What to do about it."""
    table: str | None = None
    column: str | None = None
    check: str | None = None
    value: str | None = None
    """The figure that is out of bounds, with its unit."""
    threshold: str | None = None
    since: datetime | None = None
    """When it began, where that is known better than "when it was first seen"."""
    link: str | None = None
    """Path in the Dagster UI, from its root."""
    run_id: str | None = None
    sightings: int = 1
    """In how many ticks running it must be seen before anybody is told, and be gone before it
    counts as recovered."""
    affected: frozenset[str] = frozenset()
    """`table.column` of what waits because of it."""
    own_cause: bool = False
    """Nothing else explains it (a sensor that somebody stopped, a process that was killed)."""

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same incident tick after tick."""
        return (self.kind.value, self.subject)


@dataclass
class Findings:
    """What the rules found in one tick."""

    problems: list[Problem] = field(default_factory=list)
    unknown: set[tuple[str, str]] = field(default_factory=set)
    """Keys of incidents that could not be judged: they stay as they are."""

    def add(self, other: "Findings") -> None:
        self.problems += other.problems
        self.unknown |= other.unknown


@dataclass(frozen=True)
class Root:
    """An incident that was open a while ago; work that waited for it is being caught up."""

    kind: Kind
    affected: frozenset[str]


def without_consequences(findings: Findings, roots: Sequence[Root] = ()) -> Findings:
    """Leave out what another problem explains: one cause is one alert.

    Rows that wait because their provider is down are not a second incident, nor is the run that
    failed for it. `roots` are incidents that were open at the last look or ended a short while ago:
    what waited for them is being caught up. What is left out counts as unknown: an incident of it
    that is open already stays open.
    """
    kept: list[Problem] = []
    unknown = set(findings.unknown)
    for problem in findings.problems:
        if any(_explains(other, problem) for other in findings.problems) or any(
            root.kind is not problem.kind and _is_consequence(problem, root.kind, root.affected)
            for root in roots
        ):
            unknown.add(problem.key)
        else:
            kept.append(problem)
    return Findings(kept, unknown)


def _explains(cause: Problem, effect: Problem) -> bool:
    if cause.key == effect.key:
        return False
    if cause.kind is effect.kind and not cause.own_cause:
        return False
    return _is_consequence(effect, cause.kind, cause.affected)


def _is_consequence(effect: Problem, kind: Kind, affected: frozenset[str]) -> bool:
    if effect.own_cause or effect.kind not in EXPLAINS.get(kind, ()):
        return False
    if kind is Kind.DATABASE:
        return True
    if effect.kind is Kind.CHECK and effect.check != "coverage":
        return False
    return bool(effect.affected) and effect.affected <= affected
