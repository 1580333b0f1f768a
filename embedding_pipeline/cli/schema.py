"""`migrate`, `reset` and `database-url`: the commands about the database."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from embedding_pipeline.cli.options import ERROR, declared_tables, tables_option
from embedding_pipeline.errors import PipelineError

PROMISED_SECONDS = 600.0
"""How long the embedded server waits for whoever asked for its address."""


@click.command()
@tables_option
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
        chosen = select(declared_tables(), tables, [])
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


@click.command()
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

    [(file, _)] = select(declared_tables(), [table], [column])
    with connect() as connection:
        bound = bind_column(file.spec, column)
        question = f"Drop every vector of {bound}? All its rows will have to be embedded again"
        if not yes and not click.confirm(question, err=True):
            raise PipelineError(f"{bound}: nothing was changed")
        migrations.reset(connection, bound, report=click.echo)
    click.echo(f"{bound} is empty; embed it with: embedding-pipeline backfill {table} {column}")


@click.command("database-url")
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
