"""What a table should hold, worked out in Python alone, and how it differs from what it holds.

Nothing of the pipeline's own SQL is asked: fingerprints, eligibility and vectors are made anew from
keys and texts, so that a mistake there cannot hide here.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
from psycopg import sql

from embedding_pipeline.store.column import Column
from embedding_pipeline.store.lease import read_leases
from embedding_pipeline_tests.faults.server import vector_for


def fingerprint_of(column: Column, text: str) -> UUID:
    """`md5(recipe || newline || text)`, as DESIGN.md defines it."""
    joined = f"{column.embedding.recipe}\n{text}".encode()
    return UUID(hashlib.md5(joined, usedforsecurity=False).hexdigest())


def differences(
    connection: "psycopg.Connection[Any]",
    column: Column,
    *,
    refused: Collection[str] = (),
    sent_as: Mapping[str, str] | None = None,
    pending: Collection[str] = (),
) -> list[str]:
    """Every row that is not exactly as it should be, in words.

    Args:
        refused: texts that the provider refused: their rows have neither vector nor fingerprint,
            and nothing else is in quarantine.
        sent_as: text → what was sent for it, where that is not the text itself.
        pending: texts that were not embedded yet.
    """
    embedding = column.embedding
    rows = connection.execute(
        sql.SQL("SELECT {}::text, ({})::text, {}::real[], {} FROM {}").format(
            column.key_json, column.text, column.vector, column.fingerprint, column.relation
        ),
        binary=True,
    ).fetchall()
    wrong: list[str] = []
    keys: set[tuple[str, UUID]] = set()
    texts: set[str | None] = set()
    for key, text, vector, fingerprint in rows:
        name = f"row {key} ({text if text is None else text[:40]!r})"
        texts.add(text)
        if text in refused:
            keys.add((key, fingerprint_of(column, text)))
        if text is None or not text.strip() or text in refused or text in pending:
            if vector is not None or fingerprint is not None:
                wrong.append(f"{name} should have neither vector nor fingerprint")
            continue
        sent = (sent_as or {}).get(text, embedding.prefix + text)
        truth = vector_for(sent, embedding.dimensions, embedding.model)
        if vector is None or not np.array_equal(np.array(vector, dtype=np.float32), truth):
            wrong.append(f"{name} has {'no' if vector is None else 'a wrong'} vector")
        if fingerprint != fingerprint_of(column, text):
            wrong.append(f"{name} has the fingerprint {fingerprint}")
    recorded = connection.execute(
        "SELECT key::text, fingerprint FROM embedding_pipeline.quarantined_row"
        " WHERE table_name = $1 AND column_name = $2",
        [column.facts.name, embedding.column],
    ).fetchall()
    if set(recorded) != keys:
        wrong.append(f"in quarantine are {recorded}, not {keys}")
    if not texts:
        wrong.append("the table is empty: there is nothing to compare")
    if missing := {*refused, *pending, *(sent_as or {})} - texts:
        wrong.append(f"no row has the texts {[text[:40] for text in missing]}")
    return wrong


def assert_exact(
    connection: "psycopg.Connection[Any]",
    column: Column,
    *,
    refused: Collection[str] = (),
    sent_as: Mapping[str, str] | None = None,
    pending: Collection[str] = (),
) -> None:
    """The whole table is what it should be, and nobody holds a lease on it."""
    wrong = differences(connection, column, refused=refused, sent_as=sent_as, pending=pending)
    assert not wrong, f"{len(wrong)} rows differ from the truth: {wrong[:5]}"
    live = [lease for lease in read_leases(connection, column).values() if lease.live]
    assert not live, f"left held: {live}"


def embedded(connection: "psycopg.Connection[Any]", column: Column) -> int:
    """Rows with a vector."""
    row = connection.execute(
        sql.SQL("SELECT count({}) FROM {}").format(column.vector, column.relation)
    ).fetchone()
    assert row is not None
    return int(row[0])


def places_of(connection: "psycopg.Connection[Any]", secret: str) -> list[str]:
    """Tables of which a row holds this text in any column, vectors left aside."""
    columns = connection.execute(
        "SELECT table_schema, table_name, array_agg(column_name::text) FROM"
        " information_schema.columns JOIN information_schema.tables"
        " USING (table_schema, table_name) WHERE table_type = 'BASE TABLE'"
        " AND table_schema NOT IN ('pg_catalog', 'information_schema')"
        " AND udt_name NOT IN ('vector', 'halfvec') GROUP BY 1, 2"
    ).fetchall()
    found = []
    for schema, table, names in columns:
        whole = sql.SQL(" || ' ' || ").join(
            sql.SQL("coalesce({}::text, '')").format(sql.Identifier(name)) for name in names
        )
        query = sql.SQL("SELECT count(*) FROM {} WHERE strpos({}, {}) > 0").format(
            sql.Identifier(schema, table), whole, sql.Literal(secret)
        )
        row = connection.execute(query).fetchone()
        if row is not None and row[0]:
            found.append(f"{schema}.{table}")
    return found
