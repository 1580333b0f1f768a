"""The compare-and-swap write: what reaches a row, what does not, and what it costs others."""

import json
import time
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import psycopg
import pytest
from psycopg import sql

from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import writer as writer_module
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.writer import (
    LARGEST_BATCH,
    SMALLEST_BATCH,
    StagedRow,
    Writer,
    Written,
    stored_vectors,
    stored_vectors_query,
)
from embedding_pipeline_tests.rows import (
    fill,
    fingerprints,
    make_column,
    pretend_filled,
    with_connection,
    wrong_rows,
)
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]


@pytest.fixture
def column(connection: Connection) -> Column:
    """Twenty rows, none of them embedded."""
    create_docs(connection)
    return make_column(connection, spec())


def vector(number: float, dimensions: int = 4) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return np.full(dimensions, number, dtype=np.float32)


def staged(connection: Connection, column: Column, *keys: int) -> list[StagedRow]:
    """Rows with the fingerprints that their texts call for now, and vectors of their ids."""
    known = fingerprints(connection, column)
    return [
        StagedRow((str(key),), known.get(str(key)) or uuid4().bytes, vector(key or 0.5))
        for key in keys
    ]


def write(database: str, column: Column, rows: list[StagedRow]) -> Written:
    return with_connection(database, lambda c: Writer(column).write(c, rows))


def stored(connection: Connection, key: int) -> Any:
    row = connection.execute(
        "SELECT embedding_4::real[], uuid_send(embedding_4_fingerprint) FROM docs WHERE id = $1",
        [key],
    ).fetchone()
    assert row is not None
    return row


def positions(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def test_a_batch_is_written_with_its_fingerprints(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 3, 1, 2)

    result = write(database, column, rows)

    assert result == Written(positions(0, 1, 2), positions(), positions(), positions())
    assert stored(connection, 3) == ([3.0] * 4, rows[0].fingerprint)
    assert stored(connection, 4) == (None, None)


def test_an_edited_row_is_superseded_and_keeps_what_it_had(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 1, 2)
    connection.execute("UPDATE docs SET body = 'edited meanwhile' WHERE id = 1")

    assert write(database, column, rows).superseded == positions(0)
    assert stored(connection, 1) == (None, None)
    assert stored(connection, 2)[0] == [2.0] * 4


def test_an_edit_that_commits_while_we_write_is_seen(
    database: str, connection: Connection, column: Column
) -> None:
    """The vectors are staged already; the compare-and-swap looks at the row as it is now."""
    rows = staged(connection, column, 1)
    subject = Writer(column)

    async def edit_between(c: "psycopg.AsyncConnection[Any]") -> Written:
        original = c.execute

        async def execute(query: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(query, bytes) and b"SKIP LOCKED" in query:
                connection.execute("UPDATE docs SET body = 'edited' WHERE id = 1")
            return await original(query, *arguments, **options)

        c.execute = execute  # type: ignore[method-assign]
        return await subject.write(c, rows)

    assert with_connection(database, edit_between).superseded == positions(0)
    assert stored(connection, 1) == (None, None)


def test_a_row_that_somebody_holds_is_left_at_once(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 1, 2)
    with connect(database) as user, user.transaction():
        user.execute("UPDATE docs SET tenant = 'z' WHERE id = 1")
        started = time.monotonic()
        result = write(database, column, rows)
        assert time.monotonic() - started < 2.0
    assert result == Written(positions(1), positions(), positions(0), positions())
    assert stored(connection, 1) == (None, None)


def test_a_row_that_somebody_only_refers_to_is_written(
    database: str, connection: Connection, column: Column
) -> None:
    """A foreign key's FOR KEY SHARE lock must not stop us, nor we it."""
    rows = staged(connection, column, 1)
    with connect(database) as user, user.transaction():
        user.execute("SELECT FROM docs WHERE id = 1 FOR KEY SHARE")
        assert write(database, column, rows).written == positions(0)


def test_deleted_and_rekeyed_rows_are_gone(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 1, 2, 3)
    connection.execute("DELETE FROM docs WHERE id = 1")
    connection.execute("UPDATE docs SET id = 99 WHERE id = 2")

    result = write(database, column, rows)

    assert result == Written(positions(2), positions(), positions(), positions(0, 1))
    assert stored(connection, 99) == (None, None)


def test_a_row_that_is_current_already_is_not_written_again(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 1)
    write(database, column, rows)
    before = connection.execute("SELECT ctid::text FROM docs WHERE id = 1").fetchone()

    again = [StagedRow(rows[0].key, rows[0].fingerprint, vector(9))]

    assert write(database, column, again).unchanged == positions(0)
    assert stored(connection, 1)[0] == [1.0] * 4
    assert connection.execute("SELECT ctid::text FROM docs WHERE id = 1").fetchone() == before


def test_clearing_takes_vector_and_fingerprint_unless_the_text_is_back(
    database: str, connection: Connection, column: Column
) -> None:
    fill(connection, column)
    connection.execute("UPDATE docs SET body = ' ' WHERE id IN (1, 2)")
    rows = [StagedRow(("1",), None, None), StagedRow(("2",), None, None)]
    connection.execute("UPDATE docs SET body = 'back again' WHERE id = 2")

    result = write(database, column, rows)

    assert (result.written, result.superseded) == (positions(0), positions(1))
    assert stored(connection, 1) == (None, None)
    assert stored(connection, 2)[0] is not None


@pytest.mark.parametrize("dimensions", [384, 1536])
def test_vectors_arrive_bit_by_bit(database: str, connection: Connection, dimensions: int) -> None:
    create_docs(connection, 3)
    column = make_column(connection, spec(embeddings=[embedding("e", dimensions)]))
    random = np.random.default_rng(0)
    values = random.standard_normal((3, dimensions)).astype(np.float32)
    values[0, :4] = np.array([1e-42, 3.4028235e38, -0.0, 0.1], dtype=np.float32)
    known = fingerprints(connection, column)
    rows = [StagedRow((str(i + 1),), known[str(i + 1)], values[i]) for i in range(3)]

    assert len(write(database, column, rows).written) == 3

    wanted = [row.fingerprint for row in rows if row.fingerprint is not None]
    back = with_connection(database, lambda c: stored_vectors(c, column, wanted))
    by_key = with_connection(
        database, lambda c: stored_vectors(c, column, wanted, [row.key for row in rows])
    )
    for row, value in zip(rows, values, strict=True):
        assert row.fingerprint is not None
        assert back[row.fingerprint].tobytes() == value.tobytes()
        assert by_key[row.fingerprint].tobytes() == value.tobytes()


def test_stored_vectors_of_a_row_that_changed_are_not_found(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 1)
    write(database, column, rows)
    assert rows[0].fingerprint is not None
    wanted = [rows[0].fingerprint]
    connection.execute("UPDATE docs SET embedding_4 = NULL WHERE id = 1")

    assert with_connection(database, lambda c: stored_vectors(c, column, wanted)) == {}
    assert with_connection(database, lambda c: stored_vectors(c, column, wanted, [("1",)])) == {}


@pytest.mark.parametrize(
    ("create", "id_column", "key"),
    [
        (
            'CREATE TABLE "Select" ("key" int, "or der" text, body text,'
            ' PRIMARY KEY ("key", "or der"))',
            ["key", "or der"],
            (7, 'it\'s "quoted" \\ {x} %s $1 é'),
        ),
        (
            'CREATE TABLE "Select" (t uuid PRIMARY KEY, body text)',
            "t",
            ("0b0c1d2e-0000-4000-8000-00000000000a",),
        ),
        ('CREATE TABLE "Select" ("position" text PRIMARY KEY, body text)', "position", ("",)),
        (
            'CREATE TABLE "Select" (s timestamptz, held char(5), body text, PRIMARY KEY (s, held))',
            ["s", "held"],
            ("2025-10-26 02:30:00.000001+02", "a b"),
        ),
    ],
)
def test_keys_of_every_kind(
    database: str, connection: Connection, create: str, id_column: Any, key: tuple[Any, ...]
) -> None:
    table = TableSpec.model_validate(
        {"table": "Select", "id_column": id_column, "text": "body", "embeddings": [embedding()]}
    )
    column = make_column(connection, table, create)
    values = ", ".join(f"${number}" for number in range(1, len(key) + 1))
    connection.execute(f"INSERT INTO \"Select\" VALUES ({values}, 'text')".encode(), key)
    row = connection.execute(
        sql.SQL('SELECT {}, uuid_send({}) FROM "Select"').format(
            sql.SQL(", ").join(
                sql.SQL("{}::text").format(sql.Identifier(n)) for n in table.key_columns
            ),
            column.expected,
        )
    ).fetchone()
    assert row is not None

    result = write(database, column, [StagedRow(tuple(row[:-1]), row[-1], vector(1))])

    assert result.written == positions(0)


def test_a_refused_text_takes_the_vector_of_the_text_before_with_it(
    database: str, connection: Connection, column: Column
) -> None:
    """A row was edited and the provider refuses its new text: search went on finding the row by
    words that it no longer has."""
    fill(connection, column)
    connection.execute("UPDATE docs SET body = 'edited' WHERE id <= 3")
    connection.execute(
        "UPDATE docs SET embedding_4 = NULL, embedding_4_fingerprint = NULL WHERE id = 3"
    )
    known = fingerprints(connection, column)
    refused = [StagedRow((str(i),), known[str(i)], None) for i in (1, 2, 3)]
    connection.execute("UPDATE docs SET body = 'edited again' WHERE id = 2")

    result = write(database, column, refused)

    assert result == Written(
        positions(0), positions(1), positions(), positions(), unchanged=positions(2)
    )
    assert stored(connection, 1) == (None, None)
    assert stored(connection, 2)[0] is not None, "that refusal was of a text that is gone"


def test_rows_with_and_without_a_vector_in_one_batch(
    database: str, connection: Connection, column: Column
) -> None:
    fill(connection, column)
    connection.execute("UPDATE docs SET body = NULL WHERE id = 1")
    connection.execute("UPDATE docs SET body = 'edited' WHERE id = 2")
    rows = [StagedRow(("1",), None, None), *staged(connection, column, 2)]

    assert write(database, column, rows).written == positions(0, 1)
    assert stored(connection, 1) == (None, None)
    assert stored(connection, 2)[0] == [2.0] * 4


def test_an_error_leaves_nothing_half_written(
    database: str, connection: Connection, column: Column
) -> None:
    rows = staged(connection, column, 1, 2)
    rows.append(StagedRow(("3",), fingerprints(connection, column)["3"], vector(1, 5)))

    with pytest.raises(psycopg.DataError):
        write(database, column, rows)

    assert connection.execute("SELECT count(embedding_4) FROM docs").fetchone() == (0,)
    assert write(database, column, rows[:2]).written == positions(0, 1)


def test_one_connection_writes_batch_after_batch_without_session_state(
    database: str, connection: Connection, column: Column
) -> None:
    """As behind a transaction pooler: whatever a batch leaves in the session is thrown away."""
    rows = staged(connection, column, *range(1, 13))

    async def in_batches(c: "psycopg.AsyncConnection[Any]") -> int:
        subject, written = Writer(column), 0
        for start in range(0, 12, 4):
            written += len((await subject.write(c, rows[start : start + 4])).written)
            await c.execute("DISCARD ALL")
        left = await c.execute("SELECT relname FROM pg_class WHERE relpersistence = 't'")
        assert await left.fetchall() == []
        return written

    assert with_connection(database, in_batches) == 12


def test_the_batch_size_follows_how_long_locks_are_held() -> None:
    subject = object.__new__(Writer)
    subject.batch_rows = 128
    subject._adapt(128, 0.01)
    assert subject.batch_rows == 256, "fast: twice as many"
    subject._adapt(3, 0.02)
    assert subject.batch_rows == 256, "a small batch says nothing of the cost of a row"
    subject._adapt(256, 0.8)
    assert subject.batch_rows == 25, "slow: what fits into the time"
    subject._adapt(25, 60.0)
    assert subject.batch_rows == SMALLEST_BATCH
    for _ in range(20):
        subject._adapt(subject.batch_rows, 0.0001)
    assert subject.batch_rows == LARGEST_BATCH


def test_a_table_that_is_slow_to_write_gets_smaller_batches(
    database: str, connection: Connection, column: Column
) -> None:
    """A live index, or a trigger: 2,000 rows a batch held their locks for 1.3 s, and the user's
    own UPDATE of one of them waited as long."""
    connection.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END$$"
    )
    connection.execute(
        "CREATE TRIGGER slow BEFORE UPDATE ON docs FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    rows = staged(connection, column, *range(1, 13))
    subject = Writer(column)
    assert subject.batch_rows > SMALLEST_BATCH

    async def write(c: "psycopg.AsyncConnection[Any]") -> int:
        return len((await subject.write(c, rows)).written)

    assert with_connection(database, write) == 12
    assert subject.batch_rows == SMALLEST_BATCH


def index_names(plan: Any, table: str) -> list[str]:
    """How a plan reads a table: index names, or node types where it is not by index."""
    own = []
    if plan.get("Relation Name") == table and plan["Node Type"] not in ("ModifyTable",):
        own = [plan.get("Index Name", plan["Node Type"])]
    return own + [name for child in plan.get("Plans", []) for name in index_names(child, table)]


def test_a_large_table_is_reached_through_its_key(database: str, connection: Connection) -> None:
    create_docs(connection, 50_000)
    column = make_column(connection, spec(embeddings=[embedding(reuse=True)]))
    pretend_filled(connection, column)
    connection.execute("UPDATE docs SET embedding_4 = NULL")
    rows = staged(connection, column, *range(1, 2001))
    seen: list[Any] = []

    async def explained(c: "psycopg.AsyncConnection[Any]") -> None:
        subject = Writer(column)
        async with c.transaction(force_rollback=True):
            await c.execute(writer_module._PLANNER)
            keys = [row.key[0] for row in rows]
            fingerprints = [UUID(bytes=row.fingerprint) for row in rows if row.fingerprint]
            vectors = ["[1,2,3,4]"] * len(rows)
            for query, parameters in (
                (subject._write, [keys, fingerprints, fingerprints, vectors]),
                (subject._existing, [keys]),
            ):
                cursor = await c.execute(
                    sql.SQL("EXPLAIN (FORMAT JSON) {}").format(query), parameters
                )
                row = await cursor.fetchone()
                assert row is not None
                seen.append(row[0][0]["Plan"])
        started = time.perf_counter()
        assert len((await subject.write(c, rows)).written) == 2000
        assert time.perf_counter() - started < 3.0

    with_connection(database, explained)
    for plan in seen:
        names = index_names(plan, "docs")
        assert names, json.dumps(plan, indent=1)
        assert set(names) == {"docs_pkey"}, json.dumps(plan, indent=1)


def test_stored_vectors_are_found_through_an_index(connection: Connection) -> None:
    create_docs(connection, 20_000)
    column = make_column(connection, spec(embeddings=[embedding(reuse=True)]))
    pretend_filled(connection, column)
    some = connection.execute(
        "SELECT embedding_4_fingerprint, jsonb_build_array(id::text)::text FROM docs LIMIT 300"
    ).fetchall()
    for by_key, index in ((True, "docs_pkey"), (False, "fingerprint")):
        parameters: list[Any] = [[row[0] for row in some]]
        if by_key:
            parameters.append([row[1] for row in some])
        with connection.transaction():
            connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off")
            row = connection.execute(
                sql.SQL("EXPLAIN (FORMAT JSON) {}").format(
                    stored_vectors_query(column, by_key=by_key)
                ),
                parameters,
            ).fetchone()
        assert row is not None
        (name,) = index_names(row[0][0]["Plan"], "docs")
        assert index in name


def test_two_writers_and_an_editor_leave_no_wrong_vector(
    database: str, connection: Connection, column: Column
) -> None:
    """Two writers of one column, in opposite orders, while rows change: nobody waits or fails."""
    import asyncio
    import random

    from embedding_pipeline.store.connection import open_async
    from embedding_pipeline_tests.faults.server import vector_for

    model = column.embedding.model

    def rows_now() -> list[StagedRow]:
        found = connection.execute(
            sql.SQL("SELECT id::text, body, uuid_send({}) FROM docs").format(column.expected)
        )
        return [StagedRow((k,), fp, vector_for(text, 4, model)) for k, text, fp in found if fp]

    async def main() -> None:
        one, two, editor = [await open_async(database) for _ in range(3)]
        chance = random.Random(5)
        for turn in range(25):
            rows = rows_now()
            edits = editor.execute(
                "UPDATE docs SET body = 'turn ' || $1::int || ' row ' || id WHERE id % 5 = $2",
                [turn, chance.randrange(5)],
            )
            await asyncio.gather(
                Writer(column).write(one, rows), Writer(column).write(two, rows[::-1]), edits
            )
        await asyncio.gather(one.close(), two.close(), editor.close())

    asyncio.run(main())
    write(database, column, rows_now())
    assert wrong_rows(connection, column) == []
