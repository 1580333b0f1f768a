"""`run` and `backfill`: the commands that embed."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from embedding_pipeline.cli.options import (
    CHECKS_FAILED,
    ERROR,
    columns_option,
    declared_tables,
    tables_option,
)
from embedding_pipeline.cli.output import Bar, Lines, figure, make_console
from embedding_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from rich.console import Console

    from embedding_pipeline.main_job import ColumnResult
    from embedding_pipeline.spec import EmbeddingSpec
    from embedding_pipeline.spec_files import TableFile


@click.command()
@tables_option
@columns_option
@click.option("--limit", type=click.IntRange(1), help="Embed at most this many rows a column.")
@click.option("--batch", type=click.IntRange(1, 2048), help="Texts a request.")
@click.option("--concurrency", type=click.IntRange(1, 256), help="Requests in flight.")
@click.option(
    "--sample-rows/--no-sample-rows",
    default=None,
    help="Make and fill the four sample tables where they are missing. "
    "Default: on the embedded server only.",
)
def run(
    tables: Sequence[str],
    columns: Sequence[str],
    limit: int | None,
    batch: int | None,
    concurrency: int | None,
    sample_rows: bool | None,
) -> None:
    """The whole main job: schema, rows, every column, indexes, evaluation, checks.

    Safe to repeat: it embeds what is pending and nothing else. Every step is a real Dagster run
    and shows in the UI. Ends with a table; exits with 1 when a check failed.
    """
    files = declared_tables()
    from embedding_pipeline import main_job
    from embedding_pipeline.columns import select

    chosen = select(files, tables, columns)
    console = make_console()
    instance = main_job.use_project_instance()
    refused = main_job.prepare([file for file, _ in chosen], sample_rows, console.print)
    errors = [refused] if refused else []
    job = _job()
    config = _config(limit, batch, concurrency)
    results: dict[tuple[str, str], ColumnResult] = {}
    ready: list[tuple[TableFile, list[EmbeddingSpec]]] = []
    for file, embeddings in chosen:
        usable = []
        for embedding in embeddings:
            result = main_job.ColumnResult(file.spec.table, embedding.column)
            results[result.table, result.column] = result
            try:
                column = main_job.bind_column(file.spec, embedding.column)
                _embed(console, instance, job, column, config, result)
            except PipelineError as error:
                if str(error) not in "\n".join(errors):
                    result.errors.append(str(error))
                continue
            usable.append(embedding)
        if usable:
            ready.append((file, usable))
    for file, usable in ready:
        say = Lines(console)
        errors += main_job.evaluate_and_check(instance, job, file.spec, usable, results, say)
    _closing_table(console, [file for file, _ in chosen], results)
    errors += [f"{r.table}.{r.column}: {e}" for r in results.values() for e in r.errors]
    failed = [f"{r.table}.{r.column}: {f}" for r in results.values() for f in r.failed_checks]
    for warning in (f"{r.table}.{r.column}: {w}" for r in results.values() for w in r.warnings):
        console.print(f"warning: {warning}")
    for line in failed:
        click.echo(f"check failed: {line}", err=True)
    for line in errors:
        click.echo(f"error: {line}", err=True)
    sys.exit(ERROR if errors else CHECKS_FAILED if failed else 0)


@click.command()
@click.argument("table", required=False)
@click.argument("column", required=False)
@tables_option
@columns_option
@click.option(
    "--partition",
    "partitions",
    multiple=True,
    help="Only this partition, e.g. a tenant or 2025-03.",
)
@click.option("--limit", type=click.IntRange(1), help="Embed at most this many rows.")
@click.option("--batch", type=click.IntRange(1, 2048), help="Texts a request.")
@click.option("--concurrency", type=click.IntRange(1, 256), help="Requests in flight.")
@click.option(
    "--max-cost", type=click.FloatRange(0, min_open=True), help="US dollars, never passed."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show rows, tokens, cost and three sample rows; touch nothing.",
)
def backfill(
    table: str | None,
    column: str | None,
    tables: Sequence[str],
    columns: Sequence[str],
    partitions: Sequence[str],
    limit: int | None,
    batch: int | None,
    concurrency: int | None,
    max_cost: float | None,
    dry_run: bool,
) -> None:
    """Embed what is pending, as a real Dagster run.

    \b
      embedding-pipeline backfill knowledge_chunks embedding_1536 --dry-run
      embedding-pipeline backfill knowledge_chunks embedding_1536 --partition panaderia-del-sur
      embedding-pipeline backfill --column embedding_1536 --limit 50
    """
    from embedding_pipeline import main_job
    from embedding_pipeline.columns import select

    tables = [*([table] if table else []), *tables]
    columns = [*([column] if column else []), *columns]
    chosen = select(declared_tables(), tables, columns)
    console = make_console()
    if dry_run:
        for file, embeddings in chosen:
            for embedding in embeddings:
                _announce(
                    console, main_job.bind_column(file.spec, embedding.column), partitions, limit
                )
        return
    instance = main_job.use_project_instance()
    job = _job()
    config = _config(limit, batch, concurrency, max_cost)
    failed = False
    for file, embeddings in chosen:
        for embedding in embeddings:
            result = main_job.ColumnResult(file.spec.table, embedding.column)
            try:
                bound = main_job.bind_column(file.spec, embedding.column)
                if partitions:
                    # a partition that is only in the data so far is made known by this
                    main_job.find_pending(instance, bound, console.print)
                _refuse_unknown(bound, instance, partitions)
                _embed(console, instance, job, bound, config, result, partitions)
            except PipelineError as error:
                click.echo(f"error: {error}", err=True)
                failed = True
                continue
            console.print(
                f"{bound}: {result.embedded:,} rows written, {result.tokens:,} tokens, "
                f"${result.cost:.4f}"
            )
            for line in _not_as_they_are(result):
                console.print(f"{bound}: {line}")
            for line in result.warnings:
                console.print(f"warning: {bound}: {line}")
            for line in result.errors:
                click.echo(f"error: {bound}: {line}", err=True)
                failed = True
    if failed:
        sys.exit(ERROR)


def _not_as_they_are(result: "ColumnResult") -> list[str]:
    """What became of texts that were not embedded as they stand in the table."""
    lines = []
    if result.quarantined:
        lines.append(
            f"{result.quarantined:,} rows were refused and are quarantined; why: "
            f"embedding-pipeline retry {result.table} {result.column} --list"
        )
    if result.truncated:
        lines.append(
            f"{result.truncated:,} texts were longer than the model takes and were cut "
            "(overlong: truncate)"
        )
    return lines


def _job() -> Any:
    from embedding_pipeline.definitions import defs

    return defs().resolve_implicit_global_asset_job_def()


def _embed(
    console: "Console",
    instance: Any,
    job: Any,
    column: Any,
    config: "dict[str, int | float]",
    result: "ColumnResult",
    partitions: Sequence[str] = (),
) -> None:
    """Bring one column up to date with a bar that shows it."""
    from embedding_pipeline import main_job

    with Bar(console, str(column)) as bar:

        def start(rows: int) -> None:
            bar.start(min(rows, int(config.get("limit", rows))))

        main_job.embed_pending(
            instance, job, column, config, result, console.print, partitions, start, bar.update
        )


def _config(
    limit: int | None,
    batch: int | None,
    concurrency: int | None,
    max_cost: float | None = None,
) -> dict[str, int | float]:
    values = {
        "limit": limit,
        "batch_size": batch,
        "concurrency": concurrency,
        "max_cost": max_cost,
    }
    return {name: value for name, value in values.items() if value is not None}


def _announce(
    console: "Console", column: Any, partitions: Sequence[str], limit: int | None
) -> None:
    from embedding_pipeline.embed_column import forecast
    from embedding_pipeline.store.connection import database_url

    seen = forecast(database_url(), column, list(partitions) or None)
    rows = min(seen.rows, limit or seen.rows)
    share = rows / seen.rows if seen.rows else 0
    console.print(
        f"{column}: {rows:,} rows, about {seen.tokens * share:,.0f} tokens, "
        f"${seen.cost * share:.4f} ({column.embedding.provider}, {column.embedding.model})"
    )
    for key, text in seen.samples:
        shown = " ".join(text.split())
        console.print(f"    {', '.join(key)}: {shown[:90]}{'…' if len(shown) > 90 else ''}")


def _refuse_unknown(column: Any, instance: Any, partitions: Sequence[str]) -> None:
    from embedding_pipeline.components import names

    known = names.known_partitions(instance, column.table)
    for key in partitions:
        if key not in known:
            some = ", ".join(known[:12]) + ("…" if len(known) > 12 else "")
            raise PipelineError(f"{column.table.table} has no partition {key!r}; it has {some}")


def _closing_table(
    console: "Console",
    files: "list[TableFile]",
    results: "dict[tuple[str, str], ColumnResult]",
) -> None:
    from rich.table import Table

    from embedding_pipeline.evaluation.history import latest
    from embedding_pipeline.store.catalogue import bind_columns
    from embedding_pipeline.store.connection import connect
    from embedding_pipeline.store.pending import coverage

    table = Table()
    for title in (
        "column",
        "rows",
        "embedded",
        "pending",
        "quarantined",
        "tokens",
        "cost",
        "rows/s",
        "MRR@5",
        "hit@1",
        "checks passed",
    ):
        table.add_column(title, justify="left" if title == "column" else "right")
    with connect() as connection:
        for file in files:
            for column in bind_columns(connection, file.spec):
                result = results.get((file.spec.table, column.embedding.column))
                if result is None:
                    continue
                try:
                    counts = coverage(connection, column)
                except PipelineError:
                    table.add_row(str(column), *["—"] * 10)
                    continue
                seen = latest(connection, column)
                rate = result.embedded / result.seconds if result.seconds else None
                table.add_row(
                    str(column),
                    f"{counts.rows:,}",
                    f"{counts.embedded:,}",
                    f"{counts.pending.pending:,}",
                    f"{counts.pending.quarantined:,}",
                    f"{result.tokens:,}",
                    f"${result.cost:.4f}",
                    f"{rate:,.0f}" if rate else "—",
                    figure(seen.mrr_at_5 if seen else None),
                    figure(seen.hit_at_1 if seen else None),
                    f"{result.passed}/{result.checks}",
                )
    console.print(table)
