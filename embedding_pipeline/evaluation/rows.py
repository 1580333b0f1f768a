"""Rows that a golden set or a result names, looked up by their keys."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.evaluation.errors import EvaluationError
from embedding_pipeline.evaluation.golden_set import GoldenQuery, GoldenSet
from embedding_pipeline.evaluation.keys import (
    WANTED,
    Key,
    key_arrays,
    key_from_json,
    matches_wanted,
    show_key,
    wanted_keys,
)
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import SESSION

SNIPPET_CHARACTERS = 160


@dataclass(frozen=True)
class Expected:
    """What has become of one query's expected rows."""

    existing: tuple[Key, ...]
    """As the database writes them: 7 for "7", a uuid in lower case."""
    missing: tuple[Key, ...]
    """As the golden set writes them."""
    pending: tuple[Key, ...]
    """Those of `existing` without a current vector."""


def find_expected(
    connection: "psycopg.Connection[Any]", column: Column, golden: GoldenSet
) -> list[Expected]:
    """Look up every query's expected rows, those of a query with a tenant within the tenant.

    EvaluationError names the line when a key or a tenant cannot be of the column's type.
    """
    try:
        return _find_expected(connection, column, golden.queries)
    except psycopg.DataError as error:
        raise _wrong_value(connection, column, golden, error) from None


def _find_expected(
    connection: "psycopg.Connection[Any]", column: Column, queries: Sequence[GoldenQuery]
) -> list[Expected]:
    wanted = [(number, key) for number, query in enumerate(queries) for key in query.expected]
    count = len(column.table.key_columns)
    tenants = [queries[number].tenant for number, _ in wanted]
    in_tenant: sql.Composable = sql.SQL("")
    parameters: list[Any] = key_arrays([key for _, key in wanted], count)
    if any(tenant is not None for tenant in tenants):
        name = column.table.tenant_column
        if name is None:
            raise EvaluationError(
                f"the golden set names tenants, but {column.table.table} has no tenant_column; "
                "name it in the table's YAML or leave the tenants out"
            )
        parameters.append(tenants)
        in_tenant = sql.SQL(
            " AND (({tenants})[{wanted}.ord] IS NULL"
            " OR {column} = ({tenants})[{wanted}.ord]::{type})"
        ).format(
            tenants=sql.SQL(f"${len(parameters)}::text[]"),  # a number, not user text
            wanted=WANTED,
            column=sql.Identifier(name),
            type=sql.SQL(column.facts.columns[name]),
        )
    # LATERAL, so that the user's expressions see the user's columns first, whatever their names
    query = sql.SQL(
        "SELECT {wanted}.ord, found.* FROM {keys}, LATERAL"
        " (SELECT {key}::text, {pending} OR {vector} IS NULL FROM {relation}"
        " WHERE {matches}{in_tenant} LIMIT 1) AS found"
    ).format(
        wanted=WANTED,
        keys=wanted_keys(column),
        key=column.key_json,
        pending=column.pending,
        vector=column.vector,
        relation=column.relation,
        matches=matches_wanted(column),
        in_tenant=in_tenant,
    )
    with connection.transaction():
        connection.execute(SESSION)
        rows = connection.execute(query, parameters).fetchall()
    found = {position - 1: (key_from_json(key), pending) for position, key, pending in rows}
    results = []
    position = 0
    for golden in queries:
        existing: dict[Key, bool] = {}
        missing = []
        for key in golden.expected:
            if position in found:
                existing.setdefault(*found[position])
            else:
                missing.append(key)
            position += 1
        pending = tuple(key for key, is_pending in existing.items() if is_pending)
        results.append(Expected(tuple(existing), tuple(missing), pending))
    return results


def _wrong_value(
    connection: "psycopg.Connection[Any]",
    column: Column,
    golden: GoldenSet,
    error: psycopg.DataError,
) -> EvaluationError:
    """The error for the first query whose keys or tenant the database does not take."""
    types = ", ".join(column.key_types)
    for query in golden.queries:
        try:
            _find_expected(connection, column, [query])
        except psycopg.DataError as own:
            place = f"{golden.path}:{query.line}: " if golden.path else ""
            keys = ", ".join(map(show_key, query.expected))
            tenant = f" or its tenant {query.tenant!r}" if query.tenant is not None else ""
            return EvaluationError(
                f"{place}an expected key ({keys}){tenant} does not fit {column.table.table}, "
                f"whose key is {types}: {own.diag.message_primary}; correct the golden set"
            )
    return EvaluationError(f"{column.table.table}: {error.diag.message_primary}")


def snippets(
    connection: "psycopg.Connection[Any]", column: Column, keys: Iterable[Key]
) -> dict[Key, str]:
    """The beginning of each row's text, at most SNIPPET_CHARACTERS; gone rows are left out."""
    wanted = list(dict.fromkeys(keys))
    if not wanted:
        return {}
    query = sql.SQL(
        "SELECT found.* FROM {keys}, LATERAL (SELECT {key}::text,"
        " left(({text})::text, {most}) FROM {relation} WHERE {matches}) AS found"
    ).format(
        keys=wanted_keys(column),
        key=column.key_json,
        text=column.text,
        most=sql.Literal(SNIPPET_CHARACTERS),
        relation=column.relation,
        matches=matches_wanted(column),
    )
    with connection.transaction():
        connection.execute(SESSION)
        rows = connection.execute(query, key_arrays(wanted, len(wanted[0]))).fetchall()
    return {key_from_json(key): text or "" for key, text in rows}
