"""`pause` and `resume`: the brakes."""

from typing import TYPE_CHECKING, Any

import click

from embedding_pipeline.cli.options import declared_tables

if TYPE_CHECKING:
    import psycopg

    from embedding_pipeline.store.column import Column, TableFacts


@click.command()
@click.argument("table")
@click.argument("column", required=False)
@click.option("--reason", help="Why; shown wherever somebody wonders.")
@click.option("--by", help="Who wants it.  [default: you, at this machine]")
def pause(table: str, column: str | None, reason: str | None, by: str | None) -> None:
    """Leave a table, or one of its columns, alone until it is resumed.

    The table's sensor and the nightly schedule skip it and say why; `run` and `backfill` embed
    nothing of it. A run in progress stops at its next request: what is in flight is still
    written, everything finished is kept, and the rest stays pending. A paused table's indexes are
    left alone, too. `status` and the UI show who paused it, since when and why.

    \b
      embedding-pipeline pause knowledge_chunks --reason "their migration runs tonight"
      embedding-pipeline pause knowledge_chunks embedding_1536
    """
    from embedding_pipeline.store.connection import connect
    from embedding_pipeline.store.pauses import pause as pause_table

    with connect() as connection:
        facts = _facts(connection, table, column)
        held, new = pause_table(connection, facts, column, by=by or _me(), reason=reason)
    what = f"{table}.{column}" if column else table
    click.echo(f"{what}: {held.words}" + ("" if new else " (it was already)"))
    click.echo(f"go on with: embedding-pipeline resume {table}" + (f" {column}" * bool(column)))


@click.command()
@click.argument("table")
@click.argument("column", required=False)
def resume(table: str, column: str | None) -> None:
    """Lift a pause: the table's sensor, a run or a backfill goes on with what is pending.

    Of a table, every pause is lifted, its columns' too.
    """
    from embedding_pipeline.store.connection import connect
    from embedding_pipeline.store.pauses import resume as resume_table

    with connect() as connection:
        lifted = resume_table(connection, _facts(connection, table, column), column)
    what = f"{table}.{column}" if column else table
    if not lifted:
        click.echo(f"{what} was not paused")
    for each in lifted:
        name = f"{table}.{each.column}" if each.column else table
        click.echo(f"{name}: resumed; it was {each.words}")


class Brakes:
    """The brakes as `status` shows them."""

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        from embedding_pipeline.embedders.endpoints import load_endpoints
        from embedding_pipeline.settings import load_settings

        self._connection = connection
        self._settings = load_settings()
        self._endpoints = load_endpoints(self._settings)
        self._lines: dict[str, None] = {}

    def of(self, column: "Column", as_json: bool) -> dict[str, Any]:
        """The keys that a column's object gets; none for the table, which has `lines`."""
        from embedding_pipeline.brakes import daily_caps, paused
        from embedding_pipeline.store.spending import ALL, Spending, reached, spending_today

        held = paused(self._connection, column)
        if held is not None:
            place = str(column) if held.column else column.table.table
            self._lines[f"{place}: {held.words}"] = None
        caps = daily_caps(column.embedding, self._settings, self._endpoints)
        today = spending_today(self._connection, caps.zone) if caps else {}
        own, total = (
            today.get(name, Spending(0.0)).usd for name in (caps.provider if caps else "", ALL)
        )
        stopped = reached(caps, today) if caps else None
        if caps is not None:
            self._lines[
                f"spent today ({caps.zone}): {caps.provider} {_of(own, caps.own)}, "
                f"all providers {_of(total, caps.all)}"
            ] = None
        if stopped:
            self._lines[stopped] = None
        if not as_json:
            return {}
        return {
            "paused": held
            and {
                "since": held.since.isoformat(timespec="seconds"),
                "by": held.by,
                "reason": held.reason,
                "whole_table": not held.column,
            },
            "spent_today_usd": caps and round(own, 6),
            "daily_cost_cap_usd": caps and caps.own,
            "all_spent_today_usd": caps and round(total, 6),
            "all_daily_cost_cap_usd": caps and caps.all,
            "daily_cost_cap_reached": stopped,
        }

    def lines(self) -> list[str]:
        """What is paused, what today has cost and which caps are reached."""
        return list(self._lines)


def _of(usd: float, cap: float | None) -> str:
    return f"${usd:.4f}" + (f" of ${cap:g}" if cap is not None else " (no cap)")


def _facts(connection: "psycopg.Connection[Any]", table: str, column: str | None) -> "TableFacts":
    """The table's facts; PipelineError for a name that the YAML does not declare."""
    from embedding_pipeline.columns import select
    from embedding_pipeline.store.catalogue import bind_columns
    from embedding_pipeline.store.project_schema import require_current

    [(file, _)] = select(declared_tables(), [table], [column] if column else [])
    require_current(connection)
    return bind_columns(connection, file.spec)[0].facts


def _me() -> str:
    import getpass
    import socket

    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user without a name
        return f"somebody at {socket.gethostname()}"
