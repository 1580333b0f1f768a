"""What the catalogue says of a table, and what is refused with which words."""

import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import migrate
from embedding_pipeline.store.catalogue import bind_columns, describe_table
from embedding_pipeline.store.column import TableFacts
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.conftest import with_database
from embedding_pipeline_tests.sessions import as_role
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]


@pytest.fixture
def role(postgres_url: str, connection: Connection) -> Iterator[str]:
    """A role that may log in and nothing else; what it was granted here goes with it."""
    name = f"role_{uuid.uuid4().hex[:12]}"
    with connect(postgres_url) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        connection.execute(f"DROP OWNED BY {name}")
        admin.execute(f"DROP ROLE {name}")


def refusal(connection: Connection, table: TableSpec) -> str:
    with pytest.raises(SchemaError) as caught:
        describe_table(connection, table)
    return str(caught.value)


def test_facts_of_a_plain_table(connection: Connection) -> None:
    create_docs(connection)

    facts = describe_table(connection, spec())

    assert (facts.schema, facts.name, facts.vector_schema) == ("public", "docs", "public")
    assert not facts.is_partitioned
    assert facts.owned
    assert facts.columns == {
        "id": "bigint",
        "body": "text",
        "tenant": "text",
        "created_at": "timestamp with time zone",
        "meta": "jsonb",
    }


def test_types_carry_their_schema_whatever_the_search_path(connection: Connection) -> None:
    connection.execute(
        "CREATE SCHEMA \"my types\"; CREATE TYPE \"my types\".mood AS ENUM ('a', 'b')"
    )
    connection.execute("CREATE TYPE public.colour AS ENUM ('red')")
    connection.execute(
        'CREATE TABLE docs (id uuid PRIMARY KEY, body varchar(20), tenant "my types".mood,'
        " colours public.colour[], e public.vector(3))"
    )

    facts = describe_table(connection, spec())

    assert facts.columns["tenant"] == '"my types".mood'
    assert facts.columns["colours"] == "public.colour[]"
    assert facts.columns["e"] == "public.vector(3)"
    assert facts.columns["body"] == "character varying(20)"
    connection.execute('SET search_path = "my types", pg_catalog')
    elsewhere = describe_table(connection, spec("public.docs"))
    assert elsewhere.columns == facts.columns
    for type_ in facts.columns.values():
        connection.execute(f"SELECT NULL::{type_}")


def test_a_missing_table_comes_with_a_suggestion(connection: Connection) -> None:
    create_docs(connection)
    connection.execute("CREATE SCHEMA shop; CREATE TABLE shop.notes (id int PRIMARY KEY)")

    assert "did you mean docs?" in refusal(connection, spec("doc"))
    assert "did you mean shop.notes?" in refusal(connection, spec("notes"))
    assert "there is no table Docs" in refusal(connection, spec("Docs"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"id_column": "idd"}, "idd (id_column"),
        ({"id_column": ["id", "line"]}, "line (id_column"),
        ({"tenant_column": "tenent"}, "tenent (tenant_column"),
        ({"partitions": {"by": "column", "column": "Tenant"}}, "Tenant (partitions"),
    ],
)
def test_a_missing_column_is_named_with_its_place_in_the_yaml(
    connection: Connection, changes: dict[str, Any], name: str
) -> None:
    create_docs(connection)

    message = refusal(connection, spec(**changes))

    assert f"table docs has no column {name}" in message


def test_a_misspelt_column_comes_with_a_suggestion(connection: Connection) -> None:
    create_docs(connection)

    assert "did you mean tenant?" in refusal(connection, spec(tenant_column="tenent"))


@pytest.mark.parametrize(
    "definition",
    [
        "id bigint, body text, tenant text",
        "id bigint NOT NULL, body text, tenant text, UNIQUE (id, tenant)",
        "id bigint UNIQUE, body text, tenant text",
    ],
)
def test_a_key_that_need_not_find_its_row_is_refused(
    connection: Connection, definition: str
) -> None:
    connection.execute(f"CREATE TABLE docs ({definition})")

    message = refusal(connection, spec())

    assert "unique" in message or "may be NULL" in message


def test_a_partial_or_expression_index_does_not_make_a_key_unique(connection: Connection) -> None:
    connection.execute("CREATE TABLE docs (id bigint NOT NULL, body text, tenant text)")
    connection.execute("CREATE UNIQUE INDEX ON docs (id) WHERE tenant IS NOT NULL")
    connection.execute("CREATE UNIQUE INDEX ON docs ((id + 0))")

    assert "nothing guarantees that (id) is unique" in refusal(connection, spec())


def test_a_composite_key_may_be_written_in_any_order(connection: Connection) -> None:
    connection.execute("CREATE TABLE docs (tenant text NOT NULL, id int NOT NULL, body text)")
    connection.execute("CREATE UNIQUE INDEX ON docs (tenant, id) INCLUDE (body)")

    describe_table(connection, spec(id_column=["id", "tenant"], partitions={"by": "hash"}))


@pytest.mark.parametrize(
    ("definition", "word"),
    [
        ("CREATE VIEW docs AS SELECT 1 AS id, 'x' AS body", "a view"),
        ("CREATE MATERIALIZED VIEW docs AS SELECT 1 AS id, 'x' AS body", "a materialized view"),
        ("CREATE SEQUENCE docs", "a sequence"),
    ],
)
def test_what_is_no_table_is_refused(connection: Connection, definition: str, word: str) -> None:
    connection.execute(definition)

    assert f"table docs is {word}" in refusal(connection, spec())


def test_a_foreign_table_is_refused(connection: Connection) -> None:
    connection.execute("CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w")
    connection.execute("CREATE FOREIGN TABLE docs (id int, body text, tenant text) SERVER s")

    assert "table docs is a foreign table" in refusal(connection, spec())


def test_a_partition_and_an_inheritance_parent_are_refused(connection: Connection) -> None:
    connection.execute("CREATE TABLE whole (id int PRIMARY KEY, body text) PARTITION BY HASH (id)")
    connection.execute(
        "CREATE TABLE docs PARTITION OF whole FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    )
    assert "is a partition of another table" in refusal(connection, spec())

    connection.execute("CREATE TABLE parent (id int PRIMARY KEY, body text, tenant text)")
    connection.execute("CREATE TABLE child () INHERITS (parent)")
    assert "tables that inherit from it" in refusal(connection, spec("parent"))


def test_row_level_security_that_filters_our_role_is_refused(
    database: str, connection: Connection, role: str
) -> None:
    create_docs(connection)
    connection.execute(f"GRANT SELECT, UPDATE ON docs TO {role}")
    connection.execute("ALTER TABLE docs ENABLE ROW LEVEL SECURITY")
    connection.execute("CREATE POLICY visible ON docs USING (tenant = 'a')")

    describe_table(connection, spec())  # the owner sees every row
    with connect(as_role(database, role)) as theirs:
        message = refusal(theirs, spec())

    assert "row-level security" in message
    assert role in message


def test_a_role_that_may_not_read_is_told_what_to_grant(
    database: str, connection: Connection, role: str
) -> None:
    create_docs(connection)

    with connect(as_role(database, role)) as theirs:
        assert f'GRANT SELECT, UPDATE ON "docs" TO {role}' in refusal(theirs, spec())


def test_select_update_and_temp_suffice_at_run_time(
    database: str, connection: Connection, role: str
) -> None:
    create_docs(connection)
    migrate.migrate(connection, [spec()])
    connection.execute(f"GRANT SELECT, UPDATE ON docs TO {role}")

    with connect(as_role(database, role)) as theirs:
        (column,) = bind_columns(theirs, spec())
        assert not column.facts.owned


def test_pgvector_that_is_not_installed_is_said_so(bare_database: str) -> None:
    with connect(bare_database) as connection:
        create_docs(connection)

        assert "pgvector is not installed" in refusal(connection, spec())


def test_another_encoding_than_utf8_is_refused(postgres_url: str) -> None:
    name = f"test_{uuid.uuid4().hex[:16]}"
    with connect(postgres_url) as admin:
        admin.execute(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' LOCALE_PROVIDER libc"
            " TEMPLATE template0"
        )
        try:
            with connect(with_database(postgres_url, name)) as connection:
                create_docs(connection)
                assert "encoding is LATIN1" in refusal(connection, spec())
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


BY_MONTH = {"by": "month", "column": "created_at"}


def by_month(connection: Connection, function: str, trigger: str) -> TableFacts:
    create_docs(connection)
    connection.execute(
        f"CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $f$ {function} $f$"
    )
    connection.execute(f"CREATE TRIGGER touch {trigger} EXECUTE FUNCTION touch()")
    return describe_table(connection, spec(partitions=BY_MONTH))


@pytest.mark.parametrize(
    "function",
    [
        "BEGIN NEW.created_at := now(); RETURN NEW; END",
        "BEGIN\n  new.created_at = now();\n  RETURN NEW;\nEND",
        'BEGIN IF true THEN NEW."created_at" := now(); END IF; RETURN NEW; END',
        "BEGIN SELECT now() INTO NEW.created_at; RETURN NEW; END",
        "BEGIN -- sets the time\n NEW.created_at := now(); RETURN NEW; END",
    ],
)
def test_month_on_a_column_that_a_trigger_maintains_is_refused(
    connection: Connection, function: str
) -> None:
    with pytest.raises(SchemaError, match="trigger touch sets created_at on every update"):
        by_month(connection, function, "BEFORE UPDATE ON docs FOR EACH ROW")


@pytest.mark.parametrize(
    ("function", "trigger"),
    [
        ("BEGIN NEW.meta := '{}'; RETURN NEW; END", "BEFORE UPDATE ON docs FOR EACH ROW"),
        (
            "BEGIN IF NEW.created_at = now() THEN NULL; END IF; RETURN NEW; END",
            "BEFORE UPDATE ON docs FOR EACH ROW",
        ),
        (
            "BEGIN -- NEW.created_at := now();\n RETURN NEW; END",
            "BEFORE UPDATE ON docs FOR EACH ROW",
        ),
        (
            "BEGIN NEW.created_at := now(); RETURN NEW; END",
            "BEFORE INSERT ON docs FOR EACH ROW",
        ),
        (
            "BEGIN NEW.created_at := now(); RETURN NEW; END",
            "BEFORE UPDATE OF body ON docs FOR EACH ROW",
        ),
    ],
)
def test_month_beside_a_harmless_trigger_is_taken(
    connection: Connection, function: str, trigger: str
) -> None:
    by_month(connection, function, trigger)


def test_month_on_a_column_that_moddatetime_maintains_is_refused(connection: Connection) -> None:
    create_docs(connection)
    connection.execute(
        "CREATE FUNCTION moddatetime() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
    )
    connection.execute(
        "CREATE TRIGGER touch BEFORE UPDATE ON docs FOR EACH ROW"
        " EXECUTE FUNCTION moddatetime(created_at)"
    )

    assert "trigger touch sets created_at" in refusal(connection, spec(partitions=BY_MONTH))


def test_month_needs_a_date_or_timestamp(connection: Connection) -> None:
    create_docs(connection)
    for kind in ("date", "timestamp", "timestamp(3)", "timestamptz", "timestamptz(0)"):
        connection.execute(f"ALTER TABLE docs ALTER created_at TYPE {kind}")
        describe_table(connection, spec(partitions=BY_MONTH))

    wrong = spec(partitions={"by": "month", "column": "body"})
    assert "need a date or timestamp column; body is text" in refusal(connection, wrong)
