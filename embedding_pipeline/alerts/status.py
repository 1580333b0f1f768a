"""What `status` says of the alerts. Who watches the watcher: a person who looks here."""

from typing import Any

import psycopg

from embedding_pipeline.alerts import INTERVAL_SECONDS
from embedding_pipeline.alerts.delivery import undelivered
from embedding_pipeline.alerts.incidents import OpenIncident, open_incidents, watcher
from embedding_pipeline.errors import SchemaError
from embedding_pipeline.settings import Settings, load_settings
from embedding_pipeline.store.project_schema import require_current

Connection = psycopg.Connection[Any]

LATE_SECONDS = 5.0 * INTERVAL_SECONDS
"""After so long without a tick the alert sensor counts as stopped."""


def status_lines(connection: Connection, settings: Settings) -> list[str]:
    """For `status`: when the alert sensor last ticked, what is open, what was not delivered."""
    try:
        require_current(connection)
    except SchemaError:
        return []  # said elsewhere
    environment = settings.embedding_pipeline_environment
    last = watcher(connection, environment)
    if last is None:
        lines = ["alerts: the sensor `alerts` has never ticked; nobody is told of anything"]
    else:
        late = last.seconds_ago > LATE_SECONDS
        told = ", ".join(last.channels) or "none, ALERT_URLS is not set: nobody is told"
        lines = [
            f"alerts: last look {last.seconds_ago:.0f} s ago"
            + (": THE ALERT SENSOR HAS STOPPED, nobody is told of anything" if late else "")
            + f"; channels: {told}"
        ]
    lines += [f"  open: {_words(each)}" for each in open_incidents(connection, environment)]
    lines += [
        f"  not delivered: {each}" for each in undelivered(connection, environment) if each.attempts
    ]
    return lines


def _words(incident: OpenIncident) -> str:
    since = incident.first_seen.isoformat(timespec="seconds")
    told = "" if incident.notified_at else " (not told yet: it may pass)"
    return f"{incident.problem.kind} {incident.problem.subject} since {since}{told}"


def incidents_of(connection: Connection, column: str) -> list[dict[str, Any]]:
    """The open incidents that a column (`table.column`) is affected by, as JSON."""
    return [
        {
            "kind": each.problem.kind.value,
            "subject": each.problem.subject,
            "since": each.first_seen.isoformat(timespec="seconds"),
            "told": each.notified_at is not None,
            "summary": each.problem.summary,
        }
        for each in open_incidents(connection, load_settings().embedding_pipeline_environment)
        if column in each.problem.affected
    ]
