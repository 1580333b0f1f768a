"""Evaluations in the database: one row of `golden_set_result` each."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from embedding_pipeline.evaluation.result import Evaluation
from embedding_pipeline.store.column import Column

_COLUMNS = (
    "table_schema",
    "table_name",
    "column_name",
    "model",
    "evaluated_at",
    "run_id",
    "queries",
    "missing_expected",
    "mrr_at_5",
    "hit_at_1",
    "ndcg_at_10",
    "p50_ms",
    "p95_ms",
    "index_mrr_at_5",
    "index_recall",
    "index_p50_ms",
    "index_p95_ms",
    "coverage",
)


def record(connection: "psycopg.Connection[Any]", evaluation: Evaluation) -> None:
    """Write one evaluation and note its time in the column registry."""
    names = [*_COLUMNS, "details"]
    insert = sql.SQL("INSERT INTO embedding_pipeline.golden_set_result ({}) VALUES ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.SQL(", ").join(sql.SQL(f"${number}") for number in range(1, len(names) + 1)),
    )
    values = [getattr(evaluation, name) for name in _COLUMNS]
    with connection.transaction():
        connection.execute(insert, [*values, Jsonb(evaluation.details())])
        connection.execute(
            "UPDATE embedding_pipeline.embedding_column SET evaluated_at = $1"
            " WHERE table_schema = $2 AND table_name = $3 AND column_name = $4"
            " AND evaluated_at IS DISTINCT FROM $1",
            [
                evaluation.evaluated_at,
                evaluation.table_schema,
                evaluation.table_name,
                evaluation.column_name,
            ],
        )


def history(
    connection: "psycopg.Connection[Any]", column: Column, limit: int = 20
) -> list[Evaluation]:
    """A column's evaluations, newest first, those of its former recipes included."""
    return _read(connection, column, limit, None)


def latest(connection: "psycopg.Connection[Any]", column: Column) -> Evaluation | None:
    """The newest evaluation of the column as it is now: of its present recipe."""
    found = _read(connection, column, 1, column.embedding.recipe)
    return found[0] if found else None


@dataclass(frozen=True)
class Point:
    """What a plot over time shows of one evaluation."""

    evaluated_at: datetime
    mrr_at_5: float
    golden_set_hash: str


def mrr_over_time(connection: "psycopg.Connection[Any]", column: Column, limit: int) -> list[Point]:
    """The newest evaluations of a column that have a figure, oldest first.

    Without their queries, which are a hundred kilobytes each.
    """
    rows = connection.execute(
        "SELECT evaluated_at, mrr_at_5, coalesce(details ->> 'golden_set_hash', '')"
        " FROM embedding_pipeline.golden_set_result"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3"
        " AND mrr_at_5 IS NOT NULL ORDER BY evaluated_at DESC, id DESC LIMIT $4",
        [column.facts.schema, column.facts.name, column.embedding.column, limit],
    )
    return [Point(*row) for row in rows][::-1]


def _read(
    connection: "psycopg.Connection[Any]", column: Column, limit: int, recipe: str | None
) -> list[Evaluation]:
    query = sql.SQL(
        "SELECT {columns}, details FROM embedding_pipeline.golden_set_result"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3"
        " AND ($4::text IS NULL OR details ->> 'recipe' = $4)"
        " ORDER BY evaluated_at DESC, id DESC LIMIT $5"
    ).format(columns=sql.SQL(", ").join(map(sql.Identifier, _COLUMNS)))
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(
            query,
            [column.facts.schema, column.facts.name, column.embedding.column, recipe, limit],
        )
        return [Evaluation.from_row(row) for row in cursor]
