"""`status` and `evaluate`: the commands that look."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from embedding_pipeline.cli.options import ERROR, columns_option, declared_tables, tables_option
from embedding_pipeline.cli.output import print_rows
from embedding_pipeline.errors import IdentityError, PipelineError

if TYPE_CHECKING:
    import psycopg

    from embedding_pipeline.spec_files import TableFile
    from embedding_pipeline.store.column import Column


@click.command()
@tables_option
@columns_option
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one a column.")
def status(tables: Sequence[str], columns: Sequence[str], as_json: bool) -> None:
    """Every column: rows, embedded, pending, quarantined, ineligible. Counts every row.

    Tokens and cost are those of every run so far; the last run is when the latest one ended.
    Below: what is paused, and what today has cost of the daily caps; when the alert sensor last
    looked, and which incidents are open.
    """
    from embedding_pipeline.alerts.status import incidents_of, status_lines
    from embedding_pipeline.cli.brakes import Brakes
    from embedding_pipeline.settings import load_settings
    from embedding_pipeline.store.connection import connect
    from embedding_pipeline.store.endpoint_state import read_state
    from embedding_pipeline.store.pending import coverage
    from embedding_pipeline.store.registry import verify
    from embedding_pipeline.store.results import spent

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    queries = []
    environment = load_settings().embedding_pipeline_environment
    with connect() as connection:
        brakes = Brakes(connection)
        for file, bound in _bound(connection, tables, columns, problems):
            state = None
            for column in bound:
                try:
                    verify(connection, column, environment)
                except IdentityError as error:
                    # counted by what the YAML says: this is what `--accept-reembed` would mean
                    click.echo(f"stopped: {error}", err=True)
                except PipelineError as error:
                    problems.append(str(error))
                    continue
                counts = coverage(connection, column)
                used = spent(connection, column)
                # asked here, where it is known that the project's tables are there
                state = state or read_state(connection, file.spec)
                rows.append(
                    {
                        "table": file.spec.table,
                        "column": column.embedding.column,
                        "model": column.embedding.model,
                        "dimensions": column.embedding.dimensions,
                        "rows": counts.rows,
                        "embedded": counts.embedded,
                        "pending": counts.pending.pending,
                        "quarantined": counts.pending.quarantined,
                        "ineligible": counts.ineligible,
                        "tokens": used.tokens,
                        "cost_usd": round(used.cost, 6) if as_json else f"${used.cost:.4f}",
                        "last_run_at": used.last_run_at
                        and used.last_run_at.isoformat(timespec="seconds"),
                    }
                    | brakes.of(column, as_json)
                    | (
                        {
                            "incidents": incidents_of(connection, str(column)),
                            # of the table: which endpoint, and so which column, answers queries
                            "query_endpoint": state and state.to_json(),
                        }
                        if as_json
                        else {}
                    )
                )
            if state is not None:
                queries.append(f"queries of {file.spec.table}: {state}")
        alerts = status_lines(connection, load_settings())
    print_rows(rows, as_json)
    for line in [] if as_json else [*brakes.lines(), *queries, *alerts]:
        click.echo(line)
    # what is wrong with the whole database is wrong with every column
    for line in dict.fromkeys(problems):
        click.echo(f"error: {line}", err=True)
    if problems:
        sys.exit(ERROR)


@click.command()
@tables_option
@columns_option
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one a column.")
def evaluate(tables: Sequence[str], columns: Sequence[str], as_json: bool) -> None:
    """Evaluate the golden sets now and record the result. Query vectors are cached."""
    from embedding_pipeline.components.quality import evaluate_one, golden_set
    from embedding_pipeline.store.connection import connect

    rows = []
    problems: list[str] = []
    with connect() as connection:
        for file, bound in _bound(connection, tables, columns, problems):
            golden = golden_set(file)
            if golden is None:
                problems.append(f"{file.spec.table}: its YAML names no golden set")
                continue
            for column in bound:
                try:
                    result = evaluate_one(connection, column, golden, None)
                except PipelineError as error:
                    problems.append(f"{column}: {error}")
                    continue
                rows.append(
                    {
                        "table": file.spec.table,
                        "column": column.embedding.column,
                        "model": result.model,
                        "queries": result.queries,
                        "mrr_at_5": result.mrr_at_5,
                        "hit_at_1": result.hit_at_1,
                        "ndcg_at_10": result.ndcg_at_10,
                        "p50_ms": result.p50_ms,
                        "p95_ms": result.p95_ms,
                    }
                )
    print_rows(rows, as_json)
    # what is wrong with the whole database is wrong with every column
    for line in dict.fromkeys(problems):
        click.echo(f"error: {line}", err=True)
    if problems:
        sys.exit(ERROR)


def _bound(
    connection: "psycopg.Connection[Any]",
    tables: Sequence[str],
    columns: Sequence[str],
    problems: list[str],
) -> "Iterator[tuple[TableFile, list[Column]]]":
    """The columns that were asked for, table by table; what keeps a table out joins `problems`."""
    from embedding_pipeline.columns import select
    from embedding_pipeline.store.catalogue import bind_columns

    for file, embeddings in select(declared_tables(), tables, columns):
        try:
            bound = bind_columns(connection, file.spec)
        except PipelineError as error:
            problems.append(str(error))
            continue
        yield file, [column for column in bound if column.embedding in embeddings]
