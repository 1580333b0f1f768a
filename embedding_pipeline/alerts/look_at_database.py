"""Facts from the source tables' database: what each embedding column is like now.

Costs what is pending, like a tick of the tables' own sensors; no table is scanned.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import dagster as dg
import psycopg

from embedding_pipeline.alerts.facts import CapFacts, ColumnFacts, FailingPartition
from embedding_pipeline.brakes import Held, daily_caps, held_back
from embedding_pipeline.components import names
from embedding_pipeline.components.checks import just_written, more_to_come, oldest_pending
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.identity import check_identity_cheaply
from embedding_pipeline.settings import Settings
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.lease import read_leases
from embedding_pipeline.store.pending import (
    Coverage,
    count_by_partition,
    count_kinds,
    coverage,
    estimated_rows,
)
from embedding_pipeline.store.results import note_pending
from embedding_pipeline.store.spending import ALL, is_reached, spending_today

if TYPE_CHECKING:
    from embedding_pipeline.evaluation.verdict import Verdict

Connection = psycopg.Connection[Any]


def look_at_columns(
    connection: Connection, instance: dg.DagsterInstance, tables: Sequence[TableSpec]
) -> list[ColumnFacts]:
    """Every embedding column of the tables; what could not be looked at says why.

    The instance is asked whether a run that would explain pending rows is about to start.
    """
    found: list[ColumnFacts] = []
    for table in tables:
        try:
            columns = bind_columns(connection, table)
        except PipelineError as error:
            found += [_without(table, each, stopped=str(error)) for each in table.embeddings]
            continue
        except psycopg.Error as error:
            found += [_without(table, each, unknown=_words(error)) for each in table.embeddings]
            continue
        for column in columns:
            try:
                found.append(_look_at(connection, instance, column))
            except psycopg.Error as error:
                found.append(_without(table, column.embedding, unknown=_words(error)))
    return found


def _look_at(connection: Connection, instance: dg.DagsterInstance, column: Column) -> ColumnFacts:
    try:
        check_identity_cheaply(connection, column)
    except PipelineError as error:
        return _without(column.table, column.embedding, stopped=str(error))
    waiting = count_by_partition(connection, column)
    noted = note_pending(connection, column, bool(waiting))
    leases = read_leases(connection, column)
    since = oldest_pending(noted, waiting, leases)
    held = held_back(connection, column)
    key = names.column_key(column.table, column.embedding)
    at_work = any(each in leases and leases[each].live for each in waiting) or (
        bool(waiting)
        and just_written(connection, column)
        and more_to_come(instance, column.table, key)
    )
    return ColumnFacts(
        table=column.table.table,
        column=column.embedding.column,
        asset="/".join(key.path),
        provider=column.embedding.provider,
        coverage=_coverage(connection, column, since, held, at_work=at_work),
        pending=sum(waiting.values()),
        pending_since=since,
        partitions=frozenset(waiting),
        failing=[
            FailingPartition(
                key,
                lease.failures,
                lease.heartbeat_age,
                lease.run_id,
                lease.last_error or "nothing was said",
            )
            for key, lease in sorted(leases.items())
            if lease.failures and not lease.live and key in waiting
        ],
        held=str(held) if held is not None else None,
        index_missing=_index_missing(connection, column),
    )


def look_at_caps(
    connection: Connection,
    tables: Sequence[TableSpec],
    columns: Sequence[ColumnFacts],
    settings: Settings,
    endpoints: Mapping[str, Endpoint],
) -> list[CapFacts]:
    """The daily cost caps that are reached, and the pending columns that wait for the new day."""
    today = spending_today(connection, settings.nightly_timezone)
    pending = {facts.name for facts in columns if facts.pending}
    caps: dict[str, float] = {}
    waiting: dict[str, set[str]] = {}
    for table in tables:
        for embedding in table.embeddings:
            known = daily_caps(embedding, settings, endpoints)
            for name, cap in known.caps().items() if known is not None else ():
                caps[name] = cap
                waiting.setdefault(name, set()).add(f"{table.table}.{embedding.column}")
    midnight = _next_midnight(datetime.now(ZoneInfo(settings.nightly_timezone)))
    return [
        CapFacts(
            "all providers" if name == ALL else name,
            today[name].usd,
            cap,
            midnight,
            frozenset(waiting[name] & pending),
        )
        for name, cap in caps.items()
        if name in today and is_reached(cap, today[name])
    ]


def _next_midnight(now: datetime) -> datetime:
    tomorrow = now.date() + timedelta(days=1)
    return datetime.combine(tomorrow, time(), now.tzinfo)


def _coverage(
    connection: Connection,
    column: Column,
    since: datetime | None,
    held: Held | None,
    *,
    at_work: bool,
) -> "Verdict":
    from embedding_pipeline.evaluation.verdict import coverage_verdict

    kinds = count_kinds(connection, column)
    rows = estimated_rows(connection, column) if kinds.quarantined else 0
    if kinds.quarantined and not rows:
        # too small for the planner to know its size
        counts = coverage(connection, column)
    else:
        embedded = max(0, rows - kinds.pending - kinds.quarantined)
        counts = Coverage(rows, embedded, kinds, 0)
    return coverage_verdict(
        counts,
        pending_since=since,
        now=datetime.now(UTC),
        max_pending_minutes=column.embedding.max_pending_minutes,
        max_quarantined_share=column.embedding.max_quarantined_share,
        in_flight=at_work,
        held=str(held) if held is not None else None,
    )


def _index_missing(connection: Connection, column: Column) -> str | None:
    from embedding_pipeline.evaluation.nearest import find_index

    reason = find_index(connection, column).reason
    if reason is None:
        return None
    row = connection.execute(sqlfiles.query("alerts/index_builds"), [column.facts.oid]).fetchone()
    return None if row == (True,) else reason


def _without(
    table: TableSpec,
    embedding: EmbeddingSpec,
    *,
    stopped: str | None = None,
    unknown: str | None = None,
) -> ColumnFacts:
    return ColumnFacts(
        table=table.table,
        column=embedding.column,
        asset="/".join(names.column_key(table, embedding).path),
        provider=embedding.provider,
        stopped=stopped,
        unknown=unknown,
    )


def _words(error: psycopg.Error) -> str:
    return str(error).strip()
