"""One tick of the alert sensor: looks at everything, decides, tells.

It gathers facts, lets the rules judge them and brings the incidents in the database up to date;
what is to be sent is in the database before it is sent.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg

from embedding_pipeline.alerts import NAME, column_rules, rules
from embedding_pipeline.alerts.channels import Channel, configured, unusable
from embedding_pipeline.alerts.delivery import deliver, undelivered
from embedding_pipeline.alerts.facts import ChannelFacts
from embedding_pipeline.alerts.incidents import (
    Reconciled,
    open_incidents,
    recent_roots,
    reconcile,
    watcher,
)
from embedding_pipeline.alerts.look_at_dagster import look_at_checks, look_at_runs
from embedding_pipeline.alerts.look_at_database import look_at_caps, look_at_columns
from embedding_pipeline.alerts.look_at_ticks import look_at_ticks
from embedding_pipeline.alerts.outage import Outage
from embedding_pipeline.alerts.probe import look_at_providers
from embedding_pipeline.alerts.problems import Findings, Kind, without_consequences
from embedding_pipeline.embedders.endpoints import load_endpoints
from embedding_pipeline.settings import Settings, load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.connection import DatabaseUnreachableError, connect, database_url
from embedding_pipeline.store.project_schema import require_current

Connection = psycopg.Connection[Any]

FIRST_LOOK_BACK = timedelta(minutes=15)
"""At its first tick ever the sensor looks at runs that failed so long ago."""
OVERLAP = timedelta(minutes=1)
"""Failed runs are looked at again for so long: an event may be written late."""
MOST_NAMED = 10
"""Open incidents that a tick's words name."""
REFUSALS_OF_A_DEAD_CHANNEL = 2
"""Attempts in a row after which the other channels are told."""


@dataclass
class Tick:
    """What a tick has to say."""

    words: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Why somebody has to look at the alerting itself."""
    cursor: str | None = None
    """What must be remembered while the database is away."""


def tick(
    instance: dg.DagsterInstance,
    tables: Sequence[TableSpec],
    repository: dg.RepositoryDefinition | None,
    *,
    location: str | None = None,
    cursor: str | None = None,
) -> Tick:
    """One look at everything: incidents are opened and closed, messages written and sent."""
    settings = load_settings()
    environment = settings.embedding_pipeline_environment
    channels = configured(settings)
    wrong = unusable(channels)
    usable = [channel for channel in channels if channel.name not in wrong]
    outage = Outage.read(cursor)
    done = Tick(failed=[f"ALERT_URLS: apprise does not understand entry {name}" for name in wrong])
    try:
        url = database_url()
        with connect(url) as connection:
            require_current(connection)
            result = _reconciled(connection, instance, tables, repository, location, usable)
    except (DatabaseUnreachableError, psycopg.OperationalError) as error:
        # the incidents are in the database that is away: this one is kept in the cursor
        done.words += outage.seen(str(error).strip(), usable, settings.dagster_ui_url)
        done.cursor = outage.write()
        return done
    done.words += outage.over(usable, settings.dagster_ui_url)
    done.cursor = outage.write()
    arrived = deliver(url, environment, usable)
    with connect(url) as connection:
        left = undelivered(connection, environment)
    done.failed += [f"not delivered yet: {each}" for each in left if each.attempts]
    done.words += _summary(result, usable, arrived)
    return done


def _reconciled(
    connection: Connection,
    instance: dg.DagsterInstance,
    tables: Sequence[TableSpec],
    repository: dg.RepositoryDefinition | None,
    location: str | None,
    channels: Sequence[Channel],
) -> Reconciled:
    settings = load_settings()
    environment = settings.embedding_pipeline_environment
    began = datetime.now(UTC)
    before = watcher(connection, environment)
    since = before.runs_until - OVERLAP if before else began - FIRST_LOOK_BACK
    findings = _findings(
        connection, instance, tables, repository, location, settings, since, channels
    )
    return reconcile(
        connection,
        environment,
        without_consequences(findings, recent_roots(connection, environment)),
        [channel.name for channel in channels],
        runs_until=began,
        ui=settings.dagster_ui_url,
    )


def _findings(
    connection: Connection,
    instance: dg.DagsterInstance,
    tables: Sequence[TableSpec],
    repository: dg.RepositoryDefinition | None,
    location: str | None,
    settings: Settings,
    since: datetime,
    channels: Sequence[Channel],
) -> Findings:
    environment = settings.embedding_pipeline_environment
    known = open_incidents(connection, environment)
    columns = look_at_columns(connection, instance, tables)
    findings = column_rules.column_problems(columns)
    findings.add(column_rules.check_problems(look_at_checks(instance, tables), columns))
    runs = dict(connection.execute(sqlfiles.query("alerts/runs"), [environment]).fetchall())
    findings.add(
        rules.run_problems(
            look_at_runs(
                instance,
                tables,
                columns,
                since=since,
                told=[run for run, is_open in runs.items() if is_open],
                over=[run for run, is_open in runs.items() if not is_open],
                jobs=repository.job_names if repository is not None else (),
            )
        )
    )
    if repository is not None:
        findings.add(
            rules.tick_problems(look_at_ticks(instance, repository, location, tables, myself=NAME))
        )
    embeddings = {
        f"{table.table}.{each.column}": each for table in tables for each in table.embeddings
    }
    down = [each.problem.subject for each in known if each.problem.kind is Kind.PROVIDER]
    findings.add(rules.provider_problems(look_at_providers(columns, embeddings, time.time(), down)))
    endpoints = load_endpoints(settings)
    caps = look_at_caps(connection, tables, columns, settings, endpoints)
    findings.add(rules.cap_problems(caps))
    findings.add(_channel_findings(connection, environment, channels))
    return findings


def _channel_findings(
    connection: Connection, environment: str, channels: Sequence[Channel]
) -> Findings:
    names = {channel.name for channel in channels}
    return rules.channel_problems(
        ChannelFacts(each.channel, each.error or "nothing was said", each.messages, each.since)
        for each in undelivered(connection, environment)
        if each.attempts >= REFUSALS_OF_A_DEAD_CHANNEL and each.channel in names
    )


def _summary(result: Reconciled, channels: Sequence[Channel], arrived: int) -> list[str]:
    count = len(result.open)
    words = [f"{count} incident{'s' * (count != 1)} open"]
    if result.open:
        more = f" and {count - MOST_NAMED} more" if count > MOST_NAMED else ""
        words[0] += ": " + ", ".join(result.open[:MOST_NAMED]) + more
    if result.told:
        words.append("told now: " + ", ".join(result.told))
    if result.recovered:
        words.append("recovered: " + ", ".join(result.recovered))
    if arrived:
        words.append(f"{arrived} message{'s' * (arrived != 1)} delivered")
    if not channels:
        words.append("ALERT_URLS is not set: nobody is told")
    return words
