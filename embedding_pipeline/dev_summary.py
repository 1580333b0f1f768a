"""What `dev` says it has started: what runs, where, when, and what is held back."""

from collections.abc import Sequence
from datetime import UTC, datetime

from embedding_pipeline.alerts.channels import checked
from embedding_pipeline.clock import next_time
from embedding_pipeline.components import names
from embedding_pipeline.embedders.endpoints import load_endpoints
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local.model_server import ensure_model_server
from embedding_pipeline.settings import Settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.pauses import pauses


def summary(
    tables: Sequence[TableSpec], settings: Settings, address: str, sensors: bool
) -> list[str]:
    """One line a part, `name  what and where`. Starts the local model server where it is used."""
    database = (
        "DATABASE_URL"
        if settings.database_url
        else f"embedded Postgres in {settings.embedding_pipeline_home}"
    )
    lines = [
        ("Dagster UI", address),
        ("database", f"{database}  (embedding-pipeline database-url prints its address)"),
        *(("model server", line) for line in _servers(tables, settings)),
        ("tables", ", ".join(table.table for table in tables)),
        (
            "sensors",
            f"on: {', '.join(map(names.sensor_name, tables))}, nightly_follow_up, alerts"
            if sensors
            else "off; switch them on under Automation in the UI",
        ),
        *(("nightly", line) for line in _nights(tables, settings, datetime.now(UTC), sensors)),
        ("alerts", _alerts(settings)),
        *(("paused", line) for line in _paused(tables)),
    ]
    return [f"{name:<12} {what}" for name, what in lines]


def _servers(tables: Sequence[TableSpec], settings: Settings) -> list[str]:
    """Every endpoint that the tables' columns name, with its address."""
    endpoints = load_endpoints(settings)
    used = dict.fromkeys(each.provider for table in tables for each in table.embeddings)
    local = [name for name in used if name in endpoints and not endpoints[name].base_url]
    lines = [
        f"{endpoints[name].address}  (provider {name})"
        for name in used
        if name in endpoints and endpoints[name].base_url
    ]
    if local:
        named = f"provider{'s' * (len(local) > 1)} {', '.join(local)}"
        try:
            where = ensure_model_server(settings.embedding_pipeline_home)
        except PipelineError as error:
            where = f"not running: {error}"
        lines.append(f"{where}  (on this machine, {named})")
    return lines


def _nights(
    tables: Sequence[TableSpec], settings: Settings, now: datetime, sensors: bool
) -> list[str]:
    """When the nightly schedule comes next, by time of day."""
    if not sensors:
        return ["off"]
    at_times: dict[tuple[datetime, str], list[str]] = {}
    for table in tables:
        if table.nightly.enabled:
            zone = table.nightly.timezone or settings.nightly_timezone
            coming = next_time(table.nightly.at or settings.nightly_at, zone, now)
            at_times.setdefault((coming, zone), []).append(table.table)
    if not at_times:
        return ["off for every table (nightly: false)"]
    alone = len(at_times) == 1
    return [
        f"on: next {coming:%Y-%m-%d %H:%M} {zone}" + ("" if alone else f" for {', '.join(named)}")
        for (coming, zone), named in sorted(at_times.items())
    ]


def _alerts(settings: Settings) -> str:
    channels = checked(settings)
    if not channels:
        return "to nobody: ALERT_URLS is not set"
    return f"to {', '.join(channel.name for channel in channels)}"


def _paused(tables: Sequence[TableSpec]) -> list[str]:
    found: list[str] = []
    with connect() as connection:
        for table in tables:
            try:
                held = pauses(connection, bind_columns(connection, table)[0].facts)
            except PipelineError:
                continue  # not set up, which has been said
            found += [
                f"{table.table}{'.' * bool(each.column)}{each.column}: {each.words}"
                for each in held
            ]
    return found
