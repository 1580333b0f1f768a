"""The worked example's tables: made, and filled from files in the package, where they are missing.

A table that exists is never touched, not even an empty one: its rows may have been deleted on
purpose.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.store import sqlfiles

FOLDER = Path(__file__).parent / "sample_rows"
TABLES = ("bora_docs", "phrases", "lexicon", "knowledge_chunks")


def load_samples(
    connection: "psycopg.Connection[Any]", report: Callable[[str], None]
) -> dict[str, int]:
    """Create and fill the sample tables that do not exist; returns rows loaded by table."""
    loaded: dict[str, int] = {}
    for table in TABLES:
        with connection.transaction():
            known = connection.execute("SELECT to_regclass($1)", [table]).fetchone()
            if known != (None,):
                continue
            connection.execute(sqlfiles.query(f"sample/{table}"))
            loaded[table] = _copy(connection, table)
        connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table)))
        report(f"{table}: {loaded[table]} sample rows loaded")
    return loaded


def _copy(connection: "psycopg.Connection[Any]", table: str) -> int:
    import pandas as pd

    rows = pd.read_json(FOLDER / f"{table}.jsonl", lines=True, dtype=False, convert_dates=False)
    text = io.StringIO()
    rows.to_csv(text, index=False, header=False)
    command = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, rows.columns))
    )
    with connection.cursor() as cursor, cursor.copy(command) as copy:
        copy.write(text.getvalue())
    if table == "knowledge_chunks":
        # explicit ids do not move the identity's sequence: the user's first INSERT would collide
        connection.execute(
            "SELECT setval(pg_get_serial_sequence('knowledge_chunks', 'id'), max(id))"
            " FROM knowledge_chunks"
        )
    return len(rows)
