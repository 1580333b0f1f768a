"""`retry`: the command about quarantined rows."""

import json
from collections.abc import Sequence
from typing import Any

import click

from embedding_pipeline.cli.options import declared_tables
from embedding_pipeline.cli.output import print_rows
from embedding_pipeline.errors import PipelineError


@click.command()
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

    [(file, _)] = select(declared_tables(), [table], [column])
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
                print_rows([_quarantined(row, as_json) for row in rows], as_json)
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
