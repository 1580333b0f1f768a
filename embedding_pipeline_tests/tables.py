"""Source tables and their specifications, for tests."""

from typing import Any

import psycopg

from embedding_pipeline.spec import TableSpec

MODEL_384 = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_1536 = "all-minilm-l6-v2-layers"


def embedding(column: str = "embedding_4", dimensions: int = 4, **changes: Any) -> dict[str, Any]:
    """An embedding column's specification; narrow, so that tests are quick."""
    return {
        "column": column,
        "dimensions": dimensions,
        "provider": "tei",
        "model": f"test-model-{dimensions}",
    } | changes


def spec(table: str = "docs", **changes: Any) -> TableSpec:
    """The specification of the table that `create_docs` makes, with changes."""
    values: dict[str, Any] = {
        "table": table,
        "id_column": "id",
        "text": "body",
        "partitions": {"by": "column", "column": "tenant"},
        "embeddings": [embedding()],
    }
    return TableSpec.model_validate(values | changes)


def create_docs(
    connection: "psycopg.Connection[Any]", rows: int = 20, *, table: str = "docs"
) -> None:
    """A source table: id, body, tenant (three values and NULL), created_at, meta."""
    connection.execute(
        f"CREATE TABLE {table} (id bigint PRIMARY KEY, body text, tenant text,"
        " created_at timestamptz NOT NULL DEFAULT '2025-01-15', meta jsonb)"
    )
    connection.execute(
        f"INSERT INTO {table} (id, body, tenant) SELECT i, 'text number ' || i,"
        f" (ARRAY['a', 'b', 'c', NULL])[1 + i % 4] FROM generate_series(1, {rows}) AS i"
    )
