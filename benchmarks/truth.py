"""Every row compared with the truth: a fast run that wrote a wrong vector has no figure."""

import hashlib
from uuid import UUID

import numpy as np
from psycopg import sql

from benchmarks import corpus
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect


class WrongVectorError(Exception):
    """A run left rows that are not as they should be; its figures are worth nothing."""


def check_rows(
    url: str, column: Column, *, rows: int | None = None, fingerprints: bool = True
) -> int:
    """Read the whole column back and compare each row; returns how many.

    The vector has to be `corpus.vector_of` the row's text bit by bit, and with `fingerprints` the
    fingerprint md5 of recipe and text, worked out here and not by the database. `rows` is how
    many there must be. Raises WrongVectorError naming the first rows that are wrong.
    """
    dimensions = column.embedding.dimensions
    query = sql.SQL("SELECT {}::text, {}, {}, {} FROM {}").format(
        sql.Identifier(column.table.key_columns[0]),
        sql.Identifier(column.table.text),
        column.vector,
        column.fingerprint if fingerprints else sql.SQL("NULL::uuid"),
        column.relation,
    )
    head = dimensions.to_bytes(2, "big") + b"\0\0"
    bases = corpus.bases(dimensions).astype(">f4")
    tails = [base[corpus.OWN_VALUES :].tobytes() for base in bases]
    seen = 0
    wrong: list[str] = []
    with (
        connect(url) as connection,
        connection.transaction(),
        connection.cursor("truth", binary=True) as cursor,
    ):
        cursor.itersize = 2000
        for key, text, vector, fingerprint in cursor.execute(query):
            seen += 1
            data = text.encode()
            own = corpus.own_values(data).astype(np.dtype(">f4")).tobytes()
            if vector is None:
                wrong.append(f"{key} has no vector")
            elif bytes(vector) != head + own + tails[corpus.base_of(data)]:
                wrong.append(f"{key} has another text's vector")
            elif fingerprints and fingerprint != expected_fingerprint(column, text):
                wrong.append(f"{key} has another fingerprint")
    if wrong:
        raise WrongVectorError(
            f"{column}: {len(wrong)} of {seen} rows are wrong: {'; '.join(wrong[:5])}"
        )
    if rows is not None and seen != rows:
        raise WrongVectorError(f"{column}: {seen} rows, {rows} expected")
    return seen


def expected_fingerprint(column: Column, text: str) -> UUID:
    """`md5(recipe || newline || text)` as uuid (DESIGN.md, "The words")."""
    return UUID(hashlib.md5(f"{column.embedding.recipe}\n{text}".encode()).hexdigest())
