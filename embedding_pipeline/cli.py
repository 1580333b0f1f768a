"""`embedding-pipeline`: the command line.

Heavy imports (Dagster, pandas, openai) wait until a command needs them, so that `--help` and
`status` answer at once.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedding_pipeline.errors import IdentityError, PipelineError

if TYPE_CHECKING:
    from rich.console import Console

    from embedding_pipeline.main_job import ColumnResult
    from embedding_pipeline.spec import EmbeddingSpec
    from embedding_pipeline.spec_files import TableFile

CHECKS_FAILED, ERROR = 1, 2
"""Exit codes: 0 all well, 1 a check failed, 2 something could not be done."""

PROMISED_SECONDS = 600.0
"""How long the embedded server waits for whoever asked for its address."""


class _Group(click.Group):
    """Shows our own errors as a message and exits with 2; anything else is a defect and raises."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            click.echo(f"embedding-pipeline: {error}", err=True)
            ctx.exit(ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted; what was finished is kept, run it again to go on", err=True)
            ctx.exit(130)
        except Exception as error:
            if not _is_of_the_database(error):
                raise
            click.echo(f"embedding-pipeline: the database said: {error}", err=True)
            ctx.exit(ERROR)


def _is_of_the_database(error: Exception) -> bool:
    import psycopg

    return isinstance(error, psycopg.Error)


_tables = click.option(
    "--table", "tables", multiple=True, metavar="TABLE", help="Only this table. Repeatable."
)
_columns = click.option(
    "--column", "columns", multiple=True, metavar="COLUMN", help="Only this column. Repeatable."
)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all well, 1 a check failed, 2 something could not be done. "
    "Without DATABASE_URL everything runs on an embedded Postgres under .local/.",
)
@click.version_option(package_name="embedding-pipeline")
def main() -> None:
    """Keeps pgvector embedding columns complete, current and comparable.

    \b
    First steps:
      embedding-pipeline run              the whole main job, headless
      embedding-pipeline status           every column: rows, embedded, pending
      embedding-pipeline dev              the Dagster UI, with sensors on
    """


@main.command()
@_tables
@_columns
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
    files = _files()
    from embedding_pipeline import main_job
    from embedding_pipeline.columns import select

    chosen = select(files, tables, columns)
    console = _console()
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
        errors += main_job.evaluate_and_check(instance, job, file.spec, usable, results)
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


@main.command()
@click.argument("table", required=False)
@click.argument("column", required=False)
@_tables
@_columns
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
    chosen = select(_files(), tables, columns)
    console = _console()
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
            for line in result.warnings:
                console.print(f"warning: {bound}: {line}")
            for line in result.errors:
                click.echo(f"error: {bound}: {line}", err=True)
                failed = True
    if failed:
        sys.exit(ERROR)


@main.command()
@_tables
@_columns
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one a column.")
def status(tables: Sequence[str], columns: Sequence[str], as_json: bool) -> None:
    """Every column: rows, embedded, pending, quarantined, ineligible. Counts every row.

    Tokens and cost are those of every run so far; the last run is when the latest one ended.
    """
    from embedding_pipeline.columns import select
    from embedding_pipeline.settings import load_settings
    from embedding_pipeline.store.catalogue import bind_columns
    from embedding_pipeline.store.connection import connect
    from embedding_pipeline.store.endpoint_state import read_state
    from embedding_pipeline.store.pending import coverage
    from embedding_pipeline.store.registry import verify
    from embedding_pipeline.store.results import spent

    rows: list[dict[str, Any]] = []
    problems = []
    queries = []
    environment = load_settings().embedding_pipeline_environment
    with connect() as connection:
        for file, embeddings in select(_files(), tables, columns):
            wanted = {embedding.column for embedding in embeddings}
            try:
                bound = bind_columns(connection, file.spec)
            except PipelineError as error:
                problems.append(str(error))
                continue
            before = len(rows)
            for column in bound:
                if column.embedding.column not in wanted:
                    continue
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
                )
            if len(rows) > before and (state := read_state(connection, file.spec)) is not None:
                queries.append(f"queries of {file.spec.table}: {state}")
    _print_rows(rows, as_json)
    for line in [] if as_json else queries:
        click.echo(line)
    for line in problems:
        click.echo(f"error: {line}", err=True)
    if problems:
        sys.exit(ERROR)


@main.command()
@_tables
@_columns
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one a column.")
def evaluate(tables: Sequence[str], columns: Sequence[str], as_json: bool) -> None:
    """Evaluate the golden sets now and record the result. Query vectors are cached."""
    from embedding_pipeline.columns import select
    from embedding_pipeline.components.quality import evaluate_one, golden_set
    from embedding_pipeline.store.catalogue import bind_columns
    from embedding_pipeline.store.connection import connect

    rows = []
    problems = []
    with connect() as connection:
        for file, embeddings in select(_files(), tables, columns):
            golden = golden_set(file)
            if golden is None:
                problems.append(f"{file.spec.table}: its YAML names no golden set")
                continue
            wanted = {embedding.column for embedding in embeddings}
            try:
                bound = bind_columns(connection, file.spec)
            except PipelineError as error:
                problems.append(str(error))
                continue
            for column in bound:
                if column.embedding.column not in wanted:
                    continue
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
    _print_rows(rows, as_json)
    for line in problems:
        click.echo(f"error: {line}", err=True)
    if problems:
        sys.exit(ERROR)


@main.command()
@_tables
@click.option("--dry-run", is_flag=True, help="Print exactly what would be executed.")
@click.option(
    "--accept-reembed",
    is_flag=True,
    help="Accept a changed text expression: the rows that it changes become pending.",
)
@click.option(
    "--take-ownership",
    is_flag=True,
    help="Take columns over that another environment registered.",
)
@click.option(
    "--file",
    "sql_files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Apply a SQL file of your own, once; several in the order given.",
)
def migrate(
    tables: Sequence[str],
    dry_run: bool,
    accept_reembed: bool,
    take_ownership: bool,
    sql_files: Sequence[Path],
) -> None:
    """Bring the database to what the YAML says. Safe on a live table, and to repeat."""
    from embedding_pipeline.columns import select
    from embedding_pipeline.identity import price, reembedding
    from embedding_pipeline.store import migrate as migrations
    from embedding_pipeline.store.connection import connect

    with connect() as connection:
        if sql_files:
            if dry_run:
                click.echo(migrations.render(migrations.plan_files(connection, sql_files)))
            else:
                migrations.apply_files(connection, sql_files, report=click.echo)
            return
        chosen = select(_files(), tables, [])
        specs = [file.spec for file, _ in chosen]
        if accept_reembed:
            for line in reembedding(connection, specs):
                click.echo(line, err=dry_run)
        if dry_run:
            planned = migrations.prepare(
                connection,
                specs,
                accept_reembed=accept_reembed,
                take_ownership=take_ownership,
                cost=price,
            )
            click.echo(migrations.render(planned.statements))
            for warning in planned.warnings:
                click.echo(f"warning: {warning}", err=True)
            for problem in planned.problems:
                click.echo(f"error: {problem}", err=True)
            if planned.problems:
                sys.exit(ERROR)
            return
        statements = migrations.migrate(
            connection,
            specs,
            report=click.echo,
            accept_reembed=accept_reembed,
            take_ownership=take_ownership,
            cost=price,
        )
    click.echo(f"{len(statements)} statements executed" if statements else "nothing to do")


@main.command()
@click.argument("table")
@click.argument("column")
@click.option(
    "--ids",
    multiple=True,
    metavar="JSON",
    help="Only these keys: a key or a JSON list of keys. Repeatable.",
)
@click.option("--partition", "partitions", multiple=True, help="Only this partition. Repeatable.")
@click.option(
    "--list", "only_list", is_flag=True, help="Show what is quarantined, and why; change nothing."
)
@click.option("--json", "as_json", is_flag=True, help="The list, or what was done, as JSON.")
def retry(
    table: str,
    column: str,
    ids: Sequence[str],
    partitions: Sequence[str],
    only_list: bool,
    as_json: bool,
) -> None:
    """Let quarantined rows be tried again.

    A row is quarantined when the provider refuses its text for good: it is left out of every run,
    counted apart, and kept with the provider's words, until its text changes or you retry it.
    Retrying makes the row pending, nothing more; the table's sensor or a backfill then sends it.
    Do it once what the provider complained about has changed: a model that reads longer texts, a
    content filter, a bug of theirs. A row that is refused again is quarantined again, and counts
    one attempt more.

    \b
      embedding-pipeline retry knowledge_chunks embedding_1536 --list
      embedding-pipeline retry knowledge_chunks embedding_1536
      embedding-pipeline retry knowledge_chunks embedding_1536 --ids 17 --ids '[18, 19]'
      embedding-pipeline retry phrases embedding_384 --ids 8b5b0f6e-…   text needs no quotes
      embedding-pipeline retry orders embedding_384 --ids '["acme", 7]'   a composite key
      embedding-pipeline backfill knowledge_chunks embedding_1536   embeds them now
    """
    from embedding_pipeline.columns import select
    from embedding_pipeline.store.catalogue import bind_columns
    from embedding_pipeline.store.connection import connect
    from embedding_pipeline.store.project_schema import require_current
    from embedding_pipeline.store.retry import parse_keys, quarantined_rows
    from embedding_pipeline.store.retry import retry as retry_rows

    [(file, _)] = select(_files(), [table], [column])
    width = len(file.spec.key_columns)
    keys = [key for text in ids for key in parse_keys(text, width)] if ids else None
    only = list(partitions) or None
    with connect() as connection:
        require_current(connection)
        bound = next(
            each for each in bind_columns(connection, file.spec) if each.embedding.column == column
        )
        if only_list:
            rows = quarantined_rows(connection, bound, keys=keys, partitions=only)
            if rows or as_json:
                _print_rows([_quarantined(row, as_json) for row in rows], as_json)
            else:
                click.echo(f"{bound}: no row is quarantined")
            return
        done = retry_rows(connection, bound, keys=keys, partitions=only)
    if as_json:
        unknown = [list(key) for key in done.unknown]
        click.echo(json.dumps({"retried": done.rows, "not_quarantined": unknown}))
    elif done.rows:
        click.echo(
            f"{bound}: {done.rows:,} rows are pending again; the table's sensor embeds them, or "
            f"now: embedding-pipeline backfill {table} {column}"
        )
    elif keys is None:
        click.echo(f"{bound}: no row is quarantined")
    if done.unknown:
        names = "; ".join(", ".join(key) for key in done.unknown)
        raise PipelineError(
            f"{bound}: not quarantined: {names} (see embedding-pipeline retry {table} {column} "
            "--list)"
        )


def _quarantined(row: Any, as_json: bool) -> dict[str, Any]:
    values = {
        "key": list(row.key) if as_json else ", ".join(row.key),
        "partition": row.partition,
        "error": row.error if as_json else " ".join(row.error.split()),
        "attempts": row.attempts,
        "since": row.first_at.isoformat(timespec="seconds"),
    }
    return values | {"last": row.last_at.isoformat(timespec="seconds")}


@main.command()
@click.argument("table")
@click.argument("column")
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(table: str, column: str, yes: bool) -> None:
    """Throw a column's vectors away and set it up empty, as the YAML has it now.

    One of the ways out when the YAML names another model than the column holds: a column never
    holds two models' vectors. Every row is pending afterwards.
    """
    from embedding_pipeline.columns import select
    from embedding_pipeline.main_job import bind_column
    from embedding_pipeline.store import migrate as migrations
    from embedding_pipeline.store.connection import connect

    [(file, _)] = select(_files(), [table], [column])
    with connect() as connection:
        bound = bind_column(file.spec, column)
        question = f"Drop every vector of {bound}? All its rows will have to be embedded again"
        if not yes and not click.confirm(question, err=True):
            raise PipelineError(f"{bound}: nothing was changed")
        migrations.reset(connection, bound, report=click.echo)
    click.echo(f"{bound} is empty; embed it with: embedding-pipeline backfill {table} {column}")


@main.command("database-url")
def database_url_command() -> None:
    """Print the connection string in use, starting the embedded server if need be.

    The embedded server then waits ten minutes for somebody to connect, and stays up for as long
    as somebody is connected.

    \b
      psql "$(embedding-pipeline database-url)"
    """
    from embedding_pipeline.settings import load_settings
    from embedding_pipeline.store.connection import database_url

    url = database_url()
    settings = load_settings()
    if settings.database_url is None:
        from embedding_pipeline.local.postgres import keep_up

        keep_up(settings.embedding_pipeline_home, PROMISED_SECONDS)
    click.echo(url)


@main.command()
@click.option("--port", default=3000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--sensors/--no-sensors", default=True, help="Start the sensors switched on.")
def dev(port: int, host: str, sensors: bool) -> None:
    """The Dagster UI, daemon and sensors on this machine, until Ctrl-C."""
    from embedding_pipeline.dev import serve

    sys.exit(serve(host, port, sensors))


def _files() -> "list[TableFile]":
    from embedding_pipeline.spec_files import all_table_files

    files = all_table_files()
    if not files:
        raise PipelineError(
            "no table is declared: add embedding_pipeline/defs/<table>/defs.yaml "
            "(see the README, “Adding your own table”)"
        )
    return files


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

    with _Bar(console, str(column)) as bar:

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


def _console() -> "Console":
    from rich.console import Console

    # elsewhere than on a terminal, lines are for a file: never wrapped
    width = None if sys.stdout.isatty() else 240
    return Console(width=width, soft_wrap=True, highlight=False, markup=False)


class _Bar:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: "Console", title: str) -> None:
        self.console, self.title = console, title
        self._progress: Any = None
        self._task: Any = None
        self._last = 0.0

    def __enter__(self) -> "_Bar":
        return self

    def start(self, total: int) -> None:
        """Show that so many rows are pending."""
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=total, rate="")
        else:
            self.console.print(f"{self.title}: {total:,} rows pending")

    def update(self, at: Any) -> None:
        import time

        if self._progress is not None:
            eta = f", {at.eta_seconds:.0f} s left" if at.eta_seconds is not None else ""
            self._progress.update(self._task, completed=at.done, rate=f"{at.rate:,.0f} rows/s{eta}")
        elif time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            self.console.print(f"{self.title}: {at}")

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


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
                    _figure(seen.mrr_at_5 if seen else None),
                    _figure(seen.hit_at_1 if seen else None),
                    f"{result.passed}/{result.checks}",
                )
    console.print(table)


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    from rich.table import Table

    table = Table()
    for name in rows[0] if rows else []:
        table.add_column(name.replace("_", " "), justify="left" if name in _TEXTS else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    _console().print(table)


_TEXTS = {"table", "column", "model", "key", "partition", "error", "since", "last", "last_run_at"}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "—" if value is None else str(value)


if __name__ == "__main__":
    main()
