"""Keys of rows as golden sets, reports and the database name them: tuples of JSON scalars."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from psycopg import sql

from embedding_pipeline.spec import as_json
from embedding_pipeline.store.column import Column

Key = tuple[str | int | bool, ...]
"""A row's key, always a tuple, also of one column. Fractions are kept as strings, exactly."""

WANTED = sql.Identifier("embedding_pipeline_wanted")
"""Alias of the keys that a query asks for; long, because users' tables have short names."""


def load_json(text: str) -> Any:
    """JSON with fractions as strings, since a float would not find a `numeric` key again.

    Raises ValueError for NaN and Infinity, which are Python's JSON but nobody else's.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_float=str, parse_constant=refuse)


def key_from_json(text: str) -> Key:
    """A key from what `Column.key_json` gave, as text."""
    return tuple(load_json(text))


def key_text(key: Key) -> str:
    """One canonical string for a key."""
    return as_json(list(key))


def show_key(key: Key) -> str:
    """A key for a person: the bare value when it is of one column."""
    return str(key[0]) if len(key) == 1 else key_text(key)


def key_arrays(keys: Iterable[Key], columns: int) -> list[list[str]]:
    """The keys' values as text, one array for each key column: what `unnest` takes."""
    rows = [[_as_text(value) for value in key] for key in keys]
    return [[row[position] for row in rows] for position in range(columns)]


def wanted_keys(column: Column, first_parameter: int = 1) -> sql.Composable:
    """`unnest(…) WITH ORDINALITY AS embedding_pipeline_wanted(k0, …, ord)` over `key_arrays`."""
    count = len(column.table.key_columns)
    return sql.SQL("unnest({arrays}) WITH ORDINALITY AS {alias} ({names}, ord)").format(
        arrays=sql.SQL(", ").join(
            sql.SQL(f"${first_parameter + position}::text[]")  # a number, not user text
            for position in range(count)
        ),
        alias=WANTED,
        names=sql.SQL(", ").join(sql.Identifier(f"k{position}") for position in range(count)),
    )


def matches_wanted(column: Column) -> sql.Composable:
    """True for the row that a wanted key names; the casts are on the wanted side only."""
    conditions: Sequence[sql.Composable] = [
        sql.SQL("{} = {}::{}").format(
            sql.Identifier(name),
            sql.SQL("{}.{}").format(WANTED, sql.Identifier(f"k{position}")),
            sql.SQL(key_type),  # from the catalogue's format_type, which quotes what needs it
        )
        for position, (name, key_type) in enumerate(
            zip(column.table.key_columns, column.key_types, strict=True)
        )
    ]
    return sql.SQL(" AND ").join(conditions)


def _as_text(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
