"""Migrations of live tables."""

from typing import Any

import psycopg

from embedding_pipeline.store import catalogue, migrate, registry
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]


def test_a_migrated_table_has_columns_indexes_and_a_registration(connection: Connection) -> None:
    create_docs(connection)
    table = spec()

    migrate.migrate(connection, [table])

    (column,) = catalogue.bind_columns(connection, table)
    assert column.facts.columns["embedding_4"] == "public.vector(4)"
    assert column.facts.columns["embedding_4_fingerprint"] == "uuid"
    registry.verify(connection, column, "default")
    assert migrate.plan(connection, [table]) == []
