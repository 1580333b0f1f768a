"""A table as Dagster shows it: columns with types and meaning, lineage, and rows counted."""

import re
from typing import Any

import dagster as dg
import psycopg

from embedding_pipeline.components import names
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.identity import check_identity_cheaply
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.column import Column, ColumnFacts
from embedding_pipeline.store.pending import count_kinds, estimated_rows, partitions_in_data

COUNTED_ROWS = 200_000
"""Up to this size the rows are counted for Dagster's row counts, which is a full scan."""

Metadata = dict[str, dg.MetadataValue | int | float | str]


def read_columns(connection: "psycopg.Connection[Any]", column: Column) -> list[str]:
    """The user's columns behind the text and the eligibility, as the pending index has them.

    From the catalogue, which parsed the expressions; empty when there is no such index.
    """
    rows = connection.execute(
        sqlfiles.query("catalogue/pending_columns"), [column.facts.schema, column.pending_index]
    ).fetchall()
    own = {column.embedding.column, column.embedding.fingerprint_column}
    return [
        name for name, quoted, predicate in rows if name not in own and names_it(predicate, quoted)
    ]


def names_it(expression: str, quoted: str) -> bool:
    """Whether SQL as Postgres writes it names a column, `quoted` as in `quote_ident`.

    The index also depends on the columns of its key, which say where a row lies and not what its
    text is.
    """
    without_texts = re.sub(r"'(?:[^']|'')*'", "''", expression)
    return re.search(rf'(?<![\w$."]){re.escape(quoted)}(?![\w$"(])', without_texts) is not None


def source_schema(column: Column) -> dg.TableSchema:
    """Every column of the source table that an embedding column belongs to."""
    return dg.TableSchema(
        [_described(column.table, one) for one in column.facts.attributes.values()]
    )


def embedding_schema(column: Column, read: list[str]) -> dg.TableSchema:
    """The key, what the vector is made of, the vector and its fingerprint."""
    embedding = column.embedding
    shown = dict.fromkeys(
        [*column.table.key_columns, *read, embedding.column, embedding.fingerprint_column]
    )
    attributes = column.facts.attributes
    return dg.TableSchema(
        [
            _described(column.table, attributes[name], "read by the text or by what is eligible")
            for name in shown
            if name in attributes
        ]
    )


def column_lineage(column: Column, read: list[str]) -> dg.TableColumnLineage:
    """The vector and its fingerprint come from the columns that the text reads."""
    source = names.source_key(column.table)
    texts = [dg.TableColumnDep(source, name) for name in read]
    made = [column.embedding.column, column.embedding.fingerprint_column]
    return dg.TableColumnLineage(
        {
            **{name: [dg.TableColumnDep(source, name)] for name in column.table.key_columns},
            **{name: [dg.TableColumnDep(source, name)] for name in read},
            **dict.fromkeys(made, texts),
        }
    )


def _described(
    table: TableSpec, column: ColumnFacts, otherwise: str | None = None
) -> dg.TableColumn:
    keys = table.key_columns
    return dg.TableColumn(
        column.name,
        column.type,
        description=_meaning(table, column.name) or otherwise,
        constraints=dg.TableColumnConstraints(
            nullable=not column.not_null,
            unique=keys == [column.name],
            other=["part of the key"] if column.name in keys and len(keys) > 1 else None,
        ),
    )


def _meaning(table: TableSpec, name: str) -> str | None:
    """What a column is to this project; None for one that only its owner knows."""
    roles = []
    if name in table.key_columns:
        roles.append("the row's key")
    if name == table.text:
        roles.append("the text that is embedded")
    if name == table.tenant_column:
        roles.append("the tenant")
    if name == getattr(table.partitions, "column", None):
        roles.append("the partition")
    for embedding in table.embeddings:
        if name == embedding.column:
            roles.append(f"{embedding.dimensions}-dim vector by {embedding.model}")
        if name == embedding.fingerprint_column:
            roles.append(
                f"which text and which recipe made {embedding.column}; a row is pending when it "
                "is not the present one"
            )
    return "; ".join(roles) or None


def count_rows(connection: "psycopg.Connection[Any]", column: Column) -> dict[str, int] | None:
    """Partition → rows; None for a table so large that counting would cost more than it tells."""
    if estimated_rows(connection, column) > COUNTED_ROWS:
        return None
    return dict(partitions_in_data(connection, column))


def table_figures(
    connection: "psycopg.Connection[Any]", columns: list[Column], rows: dict[str, int] | None
) -> Metadata:
    """The source table now: rows, schema, and what these of its columns have pending.

    `rows` is what `count_rows` found. A column that is not what the YAML says is named in
    `not_counted` and stops no other.
    """
    counted = estimated_rows(connection, columns[0]) if rows is None else sum(rows.values())
    metadata: Metadata = {
        "dagster/row_count": counted,
        "row_count_is_estimate": dg.MetadataValue.bool(rows is None),
        "columns": dg.MetadataValue.table_schema(source_schema(columns[0])),
    }
    problems = []
    for column in columns:
        try:
            check_identity_cheaply(connection, column)
        except PipelineError as error:
            problems.append(f"- **{column.embedding.column}**: {error}")
            continue
        kinds = count_kinds(connection, column)
        metadata[f"{column.embedding.column}_pending"] = kinds.pending
        metadata[f"{column.embedding.column}_quarantined"] = kinds.quarantined
    if problems:
        metadata["not_counted"] = dg.MetadataValue.md("\n".join(problems))
    return metadata
