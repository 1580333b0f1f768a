"""What several commands share: options, exit codes, the tables that are declared."""

from typing import TYPE_CHECKING

import click

from embedding_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from embedding_pipeline.spec_files import TableFile

CHECKS_FAILED, ERROR = 1, 2
"""Exit codes: 0 all well, 1 a check failed, 2 something could not be done."""

tables_option = click.option(
    "--table", "tables", multiple=True, metavar="TABLE", help="Only this table. Repeatable."
)
columns_option = click.option(
    "--column", "columns", multiple=True, metavar="COLUMN", help="Only this column. Repeatable."
)


def declared_tables() -> "list[TableFile]":
    from embedding_pipeline.spec_files import all_table_files

    files = all_table_files()
    if not files:
        raise PipelineError(
            "no table is declared: add embedding_pipeline/defs/<table>/defs.yaml "
            "(see the README, “Adding your own table”)"
        )
    return files
