"""Which `text` and `eligible` may stand in the pending index."""

from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store.catalogue import bind_columns, describe_table
from embedding_pipeline_tests.sessions import value
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]


def refusal(connection: Connection, **changes: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        describe_table(connection, spec(**changes))
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "body",
        "coalesce(tenant, '') || ': ' || body",
        "body || E'\\n' || coalesce(meta ->> 'title', '')",
        "CASE WHEN meta ->> 'len' ~ '^[0-9]{1,9}$' THEN (meta ->> 'len')::int::text END",
        "left(body, 100)",
        "id::text",
        "body || ' 100%'",
        "body /* the text */",
    ],
)
def test_expressions_that_fit(connection: Connection, text: str) -> None:
    create_docs(connection)

    describe_table(connection, spec(text=text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bodi", 'column "bodi" does not exist'),
        ("body ||", "syntax error"),
        ("body || (", "syntax error"),
        ("body -- the text", "syntax error"),
        ("nosuch(body)", "function nosuch(text) does not exist"),
        ("docs.body", "docs"),
    ],
)
def test_an_expression_that_does_not_parse(connection: Connection, text: str, said: str) -> None:
    create_docs(connection)

    message = refusal(connection, text=text)

    assert f"table docs: text: {text!r} is neither a column nor an SQL expression" in message
    assert said in message


def test_eligible_has_to_be_a_condition(connection: Connection) -> None:
    create_docs(connection)

    assert "eligible: 'length(body)'" in refusal(connection, eligible="length(body)")


def test_a_second_statement_is_not_executed(connection: Connection) -> None:
    create_docs(connection)

    refusal(connection, text="body) FROM docs; DROP TABLE docs; SELECT (1")

    assert value(connection, "SELECT to_regclass('docs') IS NOT NULL")


@pytest.mark.parametrize(
    "text",
    [
        "body || now()::text",
        "concat_ws(' ', tenant, body)",
        "body || created_at::text",
        "to_char(created_at, 'YYYY') || body",
        "body || random()::text",
        "format('%s', body)",
    ],
)
def test_an_expression_that_is_not_immutable(connection: Connection, text: str) -> None:
    create_docs(connection)

    message = refusal(connection, text=text)

    assert "functions in index predicate must be marked IMMUTABLE" in message
    assert "use || and coalesce" in message


@pytest.mark.parametrize(
    "text", ["(SELECT body)", "string_agg(body, '')", "row_number() OVER () || body"]
)
def test_an_expression_over_more_than_one_row(connection: Connection, text: str) -> None:
    create_docs(connection)

    assert "table docs: " in refusal(connection, text=text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "body || ((meta ->> 'len')::int)::text"}, "a row whose meta is"),
        ({"eligible": "(meta ->> 'len')::int > 10"}, "a row whose meta is"),
        ({"eligible": "(meta -> 'a' ->> 'len')::int > 10"}, "a row whose meta is"),
        ({"eligible": "(meta ->> 'public')::boolean"}, "a row whose meta is"),
        ({"eligible": "100 / id > 1"}, "a row whose id is '0'"),
        ({"eligible": "id::int > 1"}, "a row whose id is"),
        ({"eligible": "tenant::int > 1"}, "a row"),
        ({"text": "body || (1 / coalesce(length(tenant), 0))::text"}, "a row of NULLs"),
        ({"eligible": "get_byte(raw, 0) > 5"}, "a row whose raw is '\\\\x'"),
        ({"eligible": "jsonb_array_length(meta) > 0"}, "a row whose meta is"),
    ],
)
def test_an_expression_that_fails_for_some_row(
    connection: Connection, changes: dict[str, Any], said: str
) -> None:
    create_docs(connection, rows=0)
    connection.execute("ALTER TABLE docs ADD raw bytea")

    message = refusal(connection, **changes)

    assert "text or eligible fails for " + said in message
    assert "a user's INSERT or UPDATE of such a row would fail too" in message


def test_an_expression_that_fails_for_a_row_that_exists(connection: Connection) -> None:
    create_docs(connection)
    connection.execute("UPDATE docs SET body = 'trap' WHERE id = 7")

    message = refusal(
        connection, text="CASE WHEN body = 'trap' THEN (1 / (id - id))::text ELSE body END"
    )

    assert "fails for a row of the table: division by zero" in message


def test_a_key_that_cannot_be_hashed_is_refused_for_hash_partitions(
    connection: Connection,
) -> None:
    connection.execute("CREATE TABLE docs (id money PRIMARY KEY, body text, tenant text)")

    message = refusal(connection, partitions={"by": "hash"})

    assert "its rows cannot be put into partitions" in message
    describe_table(connection, spec())


def test_domains_that_refuse_null_are_no_obstacle(connection: Connection) -> None:
    connection.execute("CREATE DOMAIN title AS text NOT NULL CHECK (VALUE <> 'word')")
    connection.execute("CREATE TABLE docs (id int PRIMARY KEY, body title, tenant text)")

    describe_table(connection, spec())


def test_the_live_table_is_untouched(connection: Connection) -> None:
    create_docs(connection)
    before = connection.execute("SELECT * FROM pg_attribute WHERE attrelid = 'docs'::regclass")
    rows = before.fetchall()

    describe_table(connection, spec())

    after = connection.execute("SELECT * FROM pg_attribute WHERE attrelid = 'docs'::regclass")
    assert after.fetchall() == rows
    assert value(connection, "SELECT count(*) FROM pg_class WHERE relname ~ '_clone'") == 0


def test_a_text_is_blank_in_sql_as_in_python(connection: Connection) -> None:
    create_docs(connection, rows=0)
    (column,) = bind_columns(connection, spec())
    texts = ["", " ", "\t\r\n", "\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0", "\u1680\u2009\u2028\u3000"]
    texts += ["\u200b", "\ufeff", " a ", "\x00".replace("\x00", "0")]
    for number, text in enumerate(texts):
        connection.execute("INSERT INTO docs (id, body) VALUES ($1, $2)", [number, text])

    query = b"SELECT body, " + column.expected.as_bytes(connection) + b" IS NULL FROM docs"
    for body, ineligible in connection.execute(query):
        assert ineligible == (not body.strip()), repr(body)
