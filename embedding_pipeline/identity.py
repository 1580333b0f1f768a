"""Whether a column may be worked on, and what changing it would cost, in words."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.errors import IdentityError, SchemaError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.registry import bill_of, verify

SAMPLED_TEXTS = 200
REMEMBERED_SECONDS = 300.0


def price(column: Column, rows: int) -> str:
    """What embedding so many rows of a column costs: `about 12,000 tokens, $0.0002`.

    From the first texts of the table; nothing is sent anywhere.
    """
    # numpy and the providers' adapters: who only checks an identity does not need them
    from embedding_pipeline.embed_column import make_embedder

    embedder = make_embedder(column.embedding)
    query = sql.SQL("SELECT ({text})::text FROM {relation} WHERE {eligible} LIMIT {most}").format(
        text=column.text,
        relation=column.relation,
        eligible=column.eligible,
        most=sql.Literal(SAMPLED_TEXTS),
    )
    with connect() as connection:
        texts = [text for (text,) in connection.execute(query)]
    if not texts:
        return "at no cost"
    tokens = round(rows * sum(map(embedder.estimate_tokens, texts)) / len(texts))
    return f"about {tokens:,} tokens, ${embedder.cost(tokens):.4f}"


def check_identity(connection: "psycopg.Connection[Any]", column: Column) -> None:
    """IdentityError, with rows, cost and the ways out, unless the column is what the YAML says.

    SchemaError when it is not set up. One query, and a scan only where there is an error to raise.
    """
    verify(connection, column, load_settings().embedding_pipeline_environment, cost=price)


def reembedding(
    connection: "psycopg.Connection[Any]", tables: Sequence[TableSpec]
) -> Iterator[str]:
    """A line for each column that accepting its YAML would embed again: rows, tokens, cost."""
    environment = load_settings().embedding_pipeline_environment
    for table in tables:
        # what else is wrong with a table, the migration itself says
        with suppress(SchemaError):
            for column in bind_columns(connection, table):
                try:
                    verify(connection, column, environment)
                except IdentityError:
                    yield f"{column}: {bill_of(connection, column, price)}"


@dataclass
class _Known:
    column: Column
    short: str
    error: IdentityError
    until: float


_known: dict[str, _Known] = {}


def check_identity_cheaply(connection: "psycopg.Connection[Any]", column: Column) -> None:
    """`check_identity` for a caller that asks every few seconds: the scan is repeated rarely."""
    try:
        verify(connection, column, load_settings().embedding_pipeline_environment)
    except IdentityError as error:
        known = _known.get(str(column))
        if (
            known is None
            or (known.column, known.short) != (column, str(error))
            or known.until < time.monotonic()
        ):
            try:
                check_identity(connection, column)
            except IdentityError as full:
                until = time.monotonic() + REMEMBERED_SECONDS
                known = _known[str(column)] = _Known(column, str(error), full, until)
            else:
                return
        raise known.error from None
