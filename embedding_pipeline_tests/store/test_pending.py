"""Pending is a predicate: what it holds for, what reading it costs, and in which pages."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import pending
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.partitions import NULL_KEY, encode_value, month_bounds
from embedding_pipeline.store.pending import (
    SETTINGS,
    count_by_partition,
    count_kinds,
    coverage,
    page_query,
    partition_counts_query,
    partitions_in_data,
    quarantined_counts_query,
    sample_pending,
)
from embedding_pipeline_tests.rows import (
    fill,
    make_column,
    pages,
    pending_keys,
    pretend_filled,
    rebind,
)
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
BUCKET: dict[str, Any] = {"partitions": {"by": "hash", "buckets": 1}}


@pytest.fixture
def column(connection: Connection) -> Column:
    """Twenty rows in one bucket, all of them current."""
    create_docs(connection)
    column = make_column(connection, spec(**BUCKET, eligible="id < 1000"))
    fill(connection, column)
    return column


# ---- what is pending -------------------------------------------------------------------------


def test_a_row_with_its_own_vector_is_not_pending(connection: Connection, column: Column) -> None:
    assert pending_keys(connection, column, "0") == []
    assert coverage(connection, column) == pending.Coverage(20, 20, pending.PendingCount(), 0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("INSERT INTO docs (id, body) VALUES (108, 'new')", "missing"),
        ("UPDATE docs SET body = body || '!' WHERE id = 8", "stale"),
        ("UPDATE docs SET embedding_4 = NULL WHERE id = 8", "missing"),
        ("UPDATE docs SET embedding_4_fingerprint = NULL WHERE id = 8", "stale"),
        (
            "UPDATE docs SET embedding_4 = NULL, embedding_4_fingerprint = NULL WHERE id = 8",
            "missing",
        ),
        ("UPDATE docs SET embedding_4_fingerprint = md5('another')::uuid WHERE id = 8", "stale"),
        ("UPDATE docs SET body = NULL WHERE id = 8", "to_clear"),
        ("UPDATE docs SET body = '' WHERE id = 8", "to_clear"),
        ("UPDATE docs SET body = E' \\t\\n\\u00a0\\u2003\\u3000' WHERE id = 8", "to_clear"),
        ("UPDATE docs SET id = 1008 WHERE id = 8", "to_clear"),
    ],
)
def test_every_way_of_becoming_pending_is_one_case(
    connection: Connection, column: Column, change: str, kind: str
) -> None:
    connection.execute(change.encode())

    assert pending_keys(connection, column, "0") in ([("8",)], [("108",)], [("1008",)])
    counts = count_kinds(connection, column)
    assert counts == pending.PendingCount(**{kind: 1})
    assert count_by_partition(connection, column) == {"0": 1}
    seen = coverage(connection, column)
    assert seen.pending == counts
    assert (seen.rows, seen.embedded) == ((21, 20) if "INSERT" in change else (20, 19))
    assert seen.ineligible == 0


def test_another_recipe_makes_every_row_pending(connection: Connection, column: Column) -> None:
    for change in ({"model": "another"}, {"prefix": "passage: "}, {"overlong": "quarantine"}):
        other = rebind(connection, column, **change)
        assert count_kinds(connection, other).stale == 20


def test_a_row_that_never_qualified_is_ineligible_and_not_pending(
    connection: Connection, column: Column
) -> None:
    connection.execute("INSERT INTO docs (id, body) VALUES (30, NULL), (31, ' '), (1031, 'far')")

    assert pending_keys(connection, column, "0") == []
    assert coverage(connection, column).ineligible == 3


def test_an_eligible_condition_that_is_null_counts_as_false(connection: Connection) -> None:
    create_docs(connection, 4)
    column = make_column(connection, spec(**BUCKET, eligible="meta ->> 'public' = 'yes'"))
    connection.execute('UPDATE docs SET meta = \'{"public": "yes"}\' WHERE id = 3')

    assert pending_keys(connection, column, "0") == [("3",)]


def test_a_vector_is_adopted_by_writing_its_fingerprint(
    connection: Connection, column: Column
) -> None:
    connection.execute("INSERT INTO docs (id, body, embedding_4) VALUES (40, 'own', '[1,2,3,4]')")
    assert count_kinds(connection, column).stale == 1

    connection.execute(
        sql.SQL("UPDATE docs SET embedding_4_fingerprint = {} WHERE id = 40").format(
            column.expected
        )
    )

    assert pending_keys(connection, column, "0") == []


def test_python_and_sql_agree_on_what_is_blank(connection: Connection, column: Column) -> None:
    connection.execute("CREATE TABLE chars (id bigint PRIMARY KEY, body text)")
    table = spec("chars", **BUCKET)
    chars = make_column(connection, table)
    points = [n for n in range(1, sys.maxunicode + 1) if not 0xD800 <= n < 0xE000]
    with connection.cursor() as cursor, cursor.copy("COPY chars (id, body) FROM STDIN") as copy:
        for point in points:
            copy.write_row((point, chr(point)))

    rows = connection.execute(
        sql.SQL("SELECT id FROM chars WHERE {} IS NULL").format(chars.expected)
    ).fetchall()

    assert {row[0] for row in rows} == {point for point in points if chr(point).isspace()}


def test_what_is_asked_of_each_row_means_what_the_registry_keeps(
    connection: Connection, column: Column
) -> None:
    """`expected` looks at the first character first; `definition` is the same in plain words."""
    edges = ["", "a", "a ", " a", "\u3000", "\u3000ß", "\x85 \t", "ß\u2028", "𝄞", " " * 3000 + "x"]
    texts = [None, *edges, *(a + b for a in edges for b in edges)]
    for number, text in enumerate(texts):
        connection.execute("INSERT INTO docs (id, body) VALUES ($1, $2)", [100 + number, text])

    rows = connection.execute(
        sql.SQL("SELECT body, {}, {} FROM docs WHERE id >= 100").format(
            column.expected, column.definition
        )
    ).fetchall()

    assert len(rows) == len(texts)
    for text, asked, kept in rows:
        assert asked == kept, repr(text)
        assert (kept is None) == (text is None or not text.strip()), repr(text)


@pytest.mark.parametrize(
    ("body", "vector", "fingerprint", "is_pending"),
    [
        ("text", "vector", "its own", False),
        ("text", "vector", "another", True),
        ("text", "vector", None, True),
        ("text", None, "its own", True),
        ("text", None, "another", True),
        ("text", None, None, True),
        (" ", None, None, False),
        (" ", "vector", None, True),
        (" ", None, "another", True),
        (" ", "vector", "another", True),
    ],
)
def test_a_row_is_pending_unless_vector_and_fingerprint_are_what_its_text_calls_for(
    connection: Connection,
    column: Column,
    body: str,
    vector: str | None,
    fingerprint: str | None,
    is_pending: bool,
) -> None:
    connection.execute("DELETE FROM docs")
    connection.execute("INSERT INTO docs (id, body) VALUES (1, $1)", [body])
    stored = {"its own": column.expected, "another": sql.SQL("md5('x')::uuid")}
    connection.execute(
        sql.SQL("UPDATE docs SET embedding_4_fingerprint = {}, embedding_4 = {}").format(
            stored.get(fingerprint or "", sql.SQL("NULL")),
            sql.SQL("'[1,2,3,4]'" if vector else "NULL"),
        )
    )

    counted = count_kinds(connection, column)

    assert counted.pending == is_pending


# ---- which partition -------------------------------------------------------------------------

ODD_TEXTS = [None, "", " ", "a,b", "a%2Cb", "(null)", "(empty)", "x...y", "\x01", "'; --", '"', "ß"]


@pytest.fixture(scope="module")
def module_connection(postgres_url: str) -> Iterator[Connection]:
    """A database of its own for tests that run many examples."""
    from embedding_pipeline_tests.conftest import _fresh

    for url in _fresh(postgres_url, "template_with_pgvector"):
        with connect(url) as connection:
            connection.execute(
                "CREATE TABLE odd (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text"
                " DEFAULT 'x', word text, moment timestamptz, wall timestamp, day date)"
            )
            yield connection


@pytest.fixture(scope="module")
def odd_columns(module_connection: Connection) -> dict[str, Column]:
    """The same table partitioned in each way."""
    ways = {
        "word": {"by": "column", "column": "word"},
        "moment": {"by": "month", "column": "moment"},
        "wall": {"by": "month", "column": "wall"},
        "day": {"by": "month", "column": "day"},
        "hash": {"by": "hash", "buckets": 5},
    }
    return {
        name: make_column(
            module_connection,
            spec("odd", partitions=way, embeddings=[embedding(f"e_{name}")]),
        )
        for name, way in ways.items()
    }


MOMENTS = st.one_of(
    st.none(),
    st.sampled_from(
        [
            "infinity",
            "-infinity",
            "0044-03-15 12:00:00 BC",
            "4713-01-02 00:00:00 BC",
            "0001-01-01 00:00:00",
            "9999-12-31 23:59:59.999999",
            "10000-01-01 00:00:00",
            "2025-03-30 01:59:59.999999",
            "2025-03-30 02:00:00",
            "2025-10-26 02:30:00",
            "2024-12-31 23:30:00",
            "2025-01-01 00:30:00",
            "2024-02-29 23:59:59.999999",
        ]
    ),
    st.datetimes().map(lambda moment: moment.isoformat(" ")),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(
        st.one_of(
            st.sampled_from(ODD_TEXTS),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
        ),
        min_size=1,
        max_size=8,
    ),
    moments=st.lists(MOMENTS, min_size=1, max_size=8),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/Sao_Paulo", "Asia/Kathmandu"]),
)
def test_each_row_lies_in_exactly_one_partition(
    module_connection: Connection,
    odd_columns: dict[str, Column],
    words: list[str | None],
    moments: list[str | None],
    zone: str,
) -> None:
    connection = module_connection
    connection.execute("DELETE FROM odd")
    connection.execute(sql.SQL("SET TimeZone = {}").format(sql.Literal(zone)))
    rows = max(len(words), len(moments))
    for number in range(rows):
        moment = moments[number % len(moments)]
        connection.execute(
            "INSERT INTO odd (word, moment, wall, day) VALUES ($1, $2::text::timestamptz,"
            " $2::text::timestamp, $2::text::timestamp::date)",
            [words[number % len(words)], moment],
        )
    for column in odd_columns.values():
        counts = count_by_partition(connection, column)
        assert counts == partitions_in_data(connection, column)
        visits = Counter(
            key for partition in counts for key in pending_keys(connection, column, partition)
        )
        assert len(visits) == rows
        assert set(visits.values()) == {1}
        for partition, count in counts.items():
            assert len(pending_keys(connection, column, partition)) == count
    assert set(count_by_partition(connection, odd_columns["word"])) == {
        encode_value(words[n % len(words)]) for n in range(rows)
    }


def test_a_month_is_cut_in_utc_whatever_the_session_says(
    module_connection: Connection, odd_columns: dict[str, Column]
) -> None:
    connection = module_connection
    connection.execute("DELETE FROM odd")
    connection.execute("SET TimeZone = 'America/New_York'")
    connection.execute("INSERT INTO odd (moment) VALUES ('2025-01-31 23:30:00-05')")

    assert count_by_partition(connection, odd_columns["moment"]) == {"2025-02": 1}
    assert len(pending_keys(connection, odd_columns["moment"], "2025-02")) == 1
    assert pending_keys(connection, odd_columns["moment"], "2025-01") == []
    assert month_bounds("2025-12") == ("2025-12-01", "2026-01-01")


# ---- pages -----------------------------------------------------------------------------------

KEYS: dict[str, tuple[str, str | list[str], str]] = {
    # name: (columns, id_column, values for i)
    "bigint": ("id bigint PRIMARY KEY", "id", "i - 30"),
    "uuid": ("id uuid PRIMARY KEY", "id", "md5(i::text)::uuid"),
    "text": ("id text PRIMARY KEY", "id", "chr(64 + i % 60) || '''\" \\ é' || i"),
    "numeric": ("id numeric(10, 3) PRIMARY KEY", "id", "i / 7.0"),
    "timestamptz": (
        "id timestamptz PRIMARY KEY",
        "id",
        "timestamptz '2025-03-30 00:00Z' + i * interval '6 min 0.000001 s'",
    ),
    "composite": (
        'a int, "B c" text, PRIMARY KEY (a, "B c")',
        ["a", "B c"],
        "i % 3, 'k' || i",
    ),
    "awkward": (
        '"key" int, "position" text, "error" date, PRIMARY KEY ("key", "position", "error")',
        ["key", "position", "error"],
        "i % 3, 'k' || i % 5, date '1900-01-01' + i",
    ),
}


def keyed(connection: Connection, kind: str, rows: int, **changes: Any) -> Column:
    """A table named "Select" with a text column "Text Col" and keys of some kind."""
    columns, id_column, values = KEYS[kind]
    names = [id_column] if isinstance(id_column, str) else id_column
    connection.execute(
        f'CREATE TABLE "Select" ({columns}, "Text Col" text, "user" text, at timestamptz)'.encode()
    )
    connection.execute(
        f'INSERT INTO "Select" ({", ".join(json.dumps(name) for name in names)}, "Text Col",'
        f" \"user\", at) SELECT {values}, 'text ' || i,"
        f" (ARRAY['a', 'b', NULL])[1 + i % 3], timestamptz '2025-01-15' + i % 60 * interval '1 d'"
        f" FROM generate_series(1, {rows}) AS i".encode()
    )
    table = TableSpec.model_validate(
        {
            "table": "Select",
            "id_column": id_column,
            "text": "Text Col",
            "partitions": {"by": "column", "column": "user"},
            "embeddings": [embedding("order")],
        }
        | changes
    )
    return make_column(connection, table)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("by", ["column", "month", "hash"])
def test_pages_visit_every_pending_row_once(connection: Connection, kind: str, by: str) -> None:
    partitions = {
        "column": {"by": "column", "column": "user"},
        "month": {"by": "month", "column": "at"},
        "hash": {"by": "hash", "buckets": 3},
    }[by]
    column = keyed(connection, kind, 60, partitions=partitions)
    connection.execute(
        'UPDATE "Select" SET at = NULL WHERE "Text Col" LIKE \'text 1_\'', prepare=False
    )
    seen: list[tuple[str, ...]] = []
    counts = count_by_partition(connection, column)
    assert sum(counts.values()) == 60
    for partition, count in counts.items():
        found = pages(connection, column, partition, limit=7)
        assert [len(page) for page in found[:-1]] == [7] * (len(found) - 1)
        assert sum(map(len, found)) == count
        seen += [row.key for page in found for row in page]
    assert len(set(seen)) == 60


def test_a_page_holds_so_many_bytes_however_large_its_rows_are(connection: Connection) -> None:
    create_docs(connection, 40)
    column = make_column(connection, spec(**BUCKET))
    connection.execute("UPDATE docs SET body = repeat(md5(id::text), 32768) WHERE id <= 20")
    connection.execute("UPDATE docs SET body = NULL, embedding_4 = '[1,1,1,1]' WHERE id = 15")

    found = pages(connection, column, "0", limit=30)

    sizes = [sum(len(row.text or "") for row in page) for page in found]
    assert max(sizes) <= pending.PAGE_BYTES + 2**20
    assert len(found) >= 3
    assert sorted(int(row.key[0]) for page in found for row in page) == list(range(1, 41))


def test_a_sample_is_spread_over_the_partitions(connection: Connection) -> None:
    create_docs(connection, 40)
    column = make_column(connection, spec())

    rows = sample_pending(connection, column, ["a", "b", "c", NULL_KEY], 8)

    assert len(rows) == 8
    assert {int(row.key[0]) % 4 for row in rows} == {0, 1, 2, 3}


# ---- plans -----------------------------------------------------------------------------------

ROWS = 20_000


def plans(connection: Connection, query: sql.Composed, parameters: list[Any]) -> list[Any]:
    """Plans for these parameters, as they are run and as a generic plan, in our settings."""
    found = []
    for mode in ("force_custom_plan", "force_generic_plan"):
        with connection.transaction(force_rollback=True):
            connection.execute(SETTINGS)
            connection.execute(f"SET LOCAL plan_cache_mode = {mode}".encode())
            connection.execute(sql.SQL("PREPARE subject AS {}").format(query))
            arguments = sql.SQL(", ").join(map(sql.Literal, parameters))
            execute = sql.SQL("EXECUTE subject ({})" if parameters else "EXECUTE subject")
            row = connection.execute(
                sql.SQL("EXPLAIN (FORMAT JSON) {}").format(
                    execute.format(arguments) if parameters else execute.format()
                )
            ).fetchone()
            assert row is not None
            found.append(row[0][0]["Plan"])
            connection.execute("DEALLOCATE subject")
    return found


def nodes(plan: Any) -> Iterator[Any]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def assert_cheap(plan: Any, column: Column) -> None:
    """The source table is read through the pending index only, and never sorted."""
    every = list(nodes(plan))
    scans = [node for node in every if node.get("Relation Name") == column.facts.name]
    text = json.dumps(plan, indent=1)
    assert scans, text
    for node in scans:
        assert node["Node Type"] in ("Index Scan", "Index Only Scan"), text
        assert node["Index Name"] == column.pending_index, text
    for node in every:
        if node["Node Type"] in ("Sort", "Incremental Sort"):
            below = {n.get("Relation Name") for n in nodes(node)}
            assert column.facts.name not in below, text


@pytest.mark.parametrize("filled", [True, False], ids=["filled", "empty"])
@pytest.mark.parametrize(
    ("by", "kind"),
    [
        ("column", "bigint"),
        ("hash", "composite"),
        ("month", "uuid"),
        ("column", "awkward"),
        ("month", "text"),
        ("hash", "timestamptz"),
    ],
)
def test_reading_pending_rows_costs_what_is_pending(
    connection: Connection, by: str, kind: str, filled: bool
) -> None:
    partitions, keys = {
        "column": ({"by": "column", "column": "user"}, ["a", NULL_KEY]),
        "hash": ({"by": "hash", "buckets": 8}, ["0", "7"]),
        "month": ({"by": "month", "column": "at"}, ["2025-01", NULL_KEY, "(before-0001)"]),
    }[by]
    assert isinstance(partitions, dict)
    column = keyed(connection, kind, ROWS, partitions=partitions)
    if filled:
        # right after a bulk fill the planner knows nothing of how few rows are pending
        pretend_filled(connection, column)
        connection.execute('UPDATE "Select" SET "order" = NULL WHERE "Text Col" LIKE \'%7\'')
    first = pages(connection, column, str(keys[0]), limit=5)[0]

    for plan in plans(connection, *page_query(column, str(keys[0]), first[-1].position, 100)):
        assert_cheap(plan, column)
    for key in keys:
        for plan in plans(connection, *page_query(column, str(key), None, 100)):
            assert_cheap(plan, column)
    for query in (partition_counts_query(column), pending.kinds_query(column)):
        for plan in plans(connection, query, []):
            assert_cheap(plan, column)
    for plan in plans(connection, quarantined_counts_query(column), []):
        for node in nodes(plan):
            if node.get("Relation Name") == column.facts.name:
                assert node["Node Type"] in ("Index Scan", "Index Only Scan")
                assert node["Index Name"] in (column.pending_index, "Select_pkey")
