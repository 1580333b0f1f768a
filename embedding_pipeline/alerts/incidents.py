"""Incidents in the database: opened once, told once, closed once, whatever crashes in between.

An incident and the messages about it are written in one transaction; sending comes after. So a
process that dies between the two leaves the message, and one that dies after sending it and before
noting that sends it again: at least once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from embedding_pipeline.alerts.messages import alert_message, headline, recovery_message
from embedding_pipeline.alerts.problems import Findings, Kind, Problem, Root
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.quarantine import storable

Connection = psycopg.Connection[Any]

CATCHING_UP_SECONDS = 900.0
"""After a root cause is over, rows that waited for it are embedded; meanwhile it explains them."""
KEPT_DAYS = 90
LOCK = 7_355_641
"""Advisory lock: two alert sensors at one database take turns."""
LONGEST_TEXT = 4000


@dataclass(frozen=True)
class OpenIncident:
    """An incident that is not over."""

    problem: Problem
    first_seen: datetime
    last_seen: datetime
    notified_at: datetime | None
    """None while it has not been seen often enough to tell anybody."""
    deliveries: int
    """Messages about it that have arrived."""


@dataclass
class Reconciled:
    """What a tick changed."""

    told: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    back: set[str] = field(default_factory=set)
    """`table.column` whose provider answers again."""
    noticed: int = 0
    """Problems that have not been seen often enough to tell anybody."""
    open: list[str] = field(default_factory=list)
    """Everything that is wrong at this look."""


def reconcile(
    connection: Connection,
    environment: str,
    findings: Findings,
    channels: Sequence[str],
    *,
    runs_until: datetime,
    ui: str,
) -> Reconciled:
    """Bring the incidents to what a tick found, and write the messages that follow from it.

    One transaction. An incident that is neither among the problems nor unknown is one tick nearer
    to its end. `runs_until` is noted: up to then failed runs have been looked at.
    """
    done = Reconciled()
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock($1)", [LOCK])
        for problem in findings.problems:
            _see(connection, environment, problem, channels, ui, done)
        kept = {problem.key for problem in findings.problems} | findings.unknown
        _close(connection, environment, kept, channels, ui, done)
        if channels:
            for incident, details, first_seen in connection.execute(
                sqlfiles.query("alerts/untold"), [environment]
            ).fetchall():
                title, body = alert_message(_problem(details), first_seen, ui)
                _write(connection, incident, "alert", channels, title, body)
        connection.execute(sqlfiles.query("alerts/drop_channels"), [environment, list(channels)])
        if done.back:
            # a back-off of up to an hour was for a provider that is down
            connection.execute(sqlfiles.query("alerts/go_on"), [sorted(done.back)])
        connection.execute(sqlfiles.query("alerts/purge"), [environment, KEPT_DAYS])
        connection.execute(sqlfiles.query("alerts/tick"), [environment, runs_until, list(channels)])
    return done


def _see(
    connection: Connection,
    environment: str,
    problem: Problem,
    channels: Sequence[str],
    ui: str,
    done: Reconciled,
) -> None:
    incident, due = _one(
        connection,
        "alerts/see",
        [
            environment,
            *problem.key,
            problem.table,
            problem.column,
            Jsonb(_details(problem)),
            problem.sightings,
            problem.since,
        ],
    )
    if due:
        (first_seen,) = _one(connection, "alerts/notify", [incident])
        title, body = alert_message(problem, first_seen, ui)
        _write(connection, incident, "alert", _told(problem, channels), title, body)
        done.told.append(headline(problem))
    done.open.append(headline(problem))


def _close(
    connection: Connection,
    environment: str,
    kept: set[tuple[str, str]],
    channels: Sequence[str],
    ui: str,
    done: Reconciled,
) -> None:
    names = sorted(kept)
    parameters = [environment, [kind for kind, _ in names], [subject for _, subject in names]]
    for incident, over, told, details, first_seen, now in connection.execute(
        sqlfiles.query("alerts/unseen"), parameters
    ).fetchall():
        if not over:
            done.noticed += 1
            continue
        if not told:
            connection.execute(sqlfiles.query("alerts/forget"), [incident])
            continue
        problem = _problem(details)
        connection.execute(sqlfiles.query("alerts/recover"), [incident])
        rows = connection.execute(sqlfiles.query("alerts/told_channels"), [incident]).fetchall()
        title, body = recovery_message(problem, first_seen, now, ui)
        heard = [channel for (channel,) in rows if channel in channels]
        _write(connection, incident, "recovery", heard, title, body)
        done.recovered.append(headline(problem))
        if problem.kind is Kind.PROVIDER:
            done.back |= problem.affected


def _told(problem: Problem, channels: Sequence[str]) -> list[str]:
    """Who is told: of a channel that is down, the others."""
    return [
        channel
        for channel in channels
        if problem.kind is not Kind.CHANNEL or channel != problem.subject
    ]


def _write(
    connection: Connection,
    incident: int,
    event: str,
    channels: Sequence[str],
    title: str,
    body: str,
) -> None:
    connection.execute(
        sqlfiles.query("alerts/write"),
        [incident, event, list(channels), storable(title, 200), storable(body, LONGEST_TEXT)],
    )


def open_incidents(connection: Connection, environment: str) -> list[OpenIncident]:
    """Every incident that is not over, oldest first."""
    rows = connection.execute(sqlfiles.query("alerts/open"), [environment]).fetchall()
    return [
        OpenIncident(_problem(details), first_seen, last_seen, notified_at, deliveries)
        for _, _, _, details, first_seen, last_seen, notified_at, deliveries in rows
    ]


def recent_roots(connection: Connection, environment: str) -> list[Root]:
    """Incidents that are open or ended a short while ago, and what waited because of them."""
    rows = connection.execute(
        sqlfiles.query("alerts/roots"), [environment, CATCHING_UP_SECONDS]
    ).fetchall()
    return [Root(Kind(kind), _problem(details).affected) for kind, details in rows]


@dataclass(frozen=True)
class Watcher:
    """The alert sensor's last tick, as it noted it."""

    ticked_at: datetime
    seconds_ago: float
    runs_until: datetime
    channels: list[str]


def watcher(connection: Connection, environment: str) -> Watcher | None:
    """When the alert sensor last ticked; None when it never has."""
    row = connection.execute(sqlfiles.query("alerts/watcher"), [environment]).fetchone()
    return Watcher(*row) if row else None


def _one(connection: Connection, name: str, parameters: list[Any]) -> tuple[Any, ...]:
    row = connection.execute(sqlfiles.query(name), parameters).fetchone()
    assert row is not None
    return tuple(row)


def _details(problem: Problem) -> dict[str, Any]:
    """A problem as JSON; what may come from outside fit for a Postgres text."""
    values: dict[str, Any] = {}
    for name, value in asdict(problem).items():
        if isinstance(value, frozenset):
            value = sorted(value)
        elif isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, str):
            value = storable(value, LONGEST_TEXT)
        values[name] = value
    return values


def _problem(details: Mapping[str, Any]) -> Problem:
    known = {field.name for field in fields(Problem)}
    values = {name: value for name, value in details.items() if name in known}
    values["kind"] = Kind(values["kind"])
    values["affected"] = frozenset(values.get("affected", ()))
    if values.get("since"):
        values["since"] = datetime.fromisoformat(values["since"])
    return Problem(**values)
