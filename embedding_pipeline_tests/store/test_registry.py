"""Identity: a column never holds two recipes' vectors, and an edit never becomes a bill."""

from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import IdentityError, SchemaError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import migrate, registry
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.sessions import value
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]


def bound(connection: Connection, table: TableSpec) -> Column:
    return bind_columns(connection, table)[0]


def fill(connection: Connection, column: Column) -> None:
    """Bring every row up to date, as a backfill would."""
    query = b"UPDATE docs SET embedding_4 = '[1,2,3,4]', embedding_4_fingerprint = "
    connection.execute(query + column.expected.as_bytes(connection))


def pending(connection: Connection, column: Column) -> int:
    query = b"SELECT count(*) FROM docs WHERE " + column.pending.as_bytes(connection)
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def docs(connection: Connection) -> Column:
    """A migrated table with all its vectors."""
    create_docs(connection)
    migrate.migrate(connection, [spec()])
    column = bound(connection, spec())
    fill(connection, column)
    assert pending(connection, column) == 0
    return column


def refusal(connection: Connection, table: TableSpec, environment: str = "default") -> str:
    with pytest.raises(IdentityError) as caught:
        registry.verify(connection, bound(connection, table), environment)
    return str(caught.value)


def test_a_column_that_says_what_it_was_filled_with_is_taken(
    connection: Connection, docs: Column
) -> None:
    registry.verify(connection, docs, "default")


def test_a_database_without_the_project_and_a_column_without_registration(
    connection: Connection,
) -> None:
    create_docs(connection)
    with pytest.raises(SchemaError, match="not set up for the project; run `embedding-pipeline"):
        registry.verify(connection, bound(connection, spec()), "default")
    migrate.migrate(connection, [])
    with pytest.raises(SchemaError, match=r"docs\.embedding_4 is not set up in this database"):
        registry.verify(connection, bound(connection, spec()), "default")


def test_registered_columns_are_listed(connection: Connection, docs: Column) -> None:
    (row,) = registry.registered(connection)

    assert (row.table_schema, row.table_name, row.column_name) == ("public", "docs", "embedding_4")
    assert (row.provider, row.model, row.dimensions) == ("tei", "test-model-4", 4)
    assert row.recipe == docs.embedding.recipe
    assert row.environment == "default"


def test_a_changed_text_names_both_sides_and_the_ways_out(
    connection: Connection, docs: Column
) -> None:
    message = refusal(connection, spec(text="body || ' '", eligible="id > 3"))

    assert 'text      in the database: "body"' in message
    assert "in the YAML:     (body || ' ')" in message
    assert "eligible  in the database: every row with text" in message
    assert "in the YAML:     (id > 3)" in message
    assert "put the YAML back" in message
    assert "`embedding-pipeline migrate --accept-reembed`" in message
    assert "`embedding-pipeline reset docs embedding_4`" in message
    assert "--take-ownership" not in message


def test_another_model_may_only_have_a_column_of_its_own(
    connection: Connection, docs: Column
) -> None:
    other = spec(embeddings=[embedding(model="another-model")])
    message = refusal(connection, other)

    assert '"model":"test-model-4"' in message
    assert '"model":"another-model"' in message
    assert "give the new model a new column" in message
    assert "--accept-reembed" not in message

    for owner in (False, True):
        with pytest.raises(IdentityError, match="give the new model a new column"):
            migrate.migrate(connection, [other], accept_reembed=True, take_ownership=owner)
    registry.verify(connection, docs, "default")
    assert pending(connection, docs) == 0


def test_another_environment_may_take_a_column_over(connection: Connection, docs: Column) -> None:
    message = refusal(connection, spec(), "staging")
    assert "environment  in the database: default" in message
    assert "in the YAML:     staging" in message
    assert "`embedding-pipeline migrate --take-ownership`" in message
    assert "--accept-reembed" not in message
    with pytest.raises(IdentityError, match="--take-ownership"):
        migrate.migrate(connection, [spec()], environment="staging")

    migrate.migrate(connection, [spec()], environment="staging", take_ownership=True)

    registry.verify(connection, docs, "staging")
    assert pending(connection, docs) == 0
    assert "in the database: staging" in refusal(connection, spec(), "default")


def test_taking_a_column_over_does_not_accept_its_changed_text(
    connection: Connection, docs: Column
) -> None:
    changed = spec(text="body || ' '")

    with pytest.raises(IdentityError):
        migrate.migrate(connection, [changed], environment="staging", take_ownership=True)
    with pytest.raises(IdentityError):
        migrate.migrate(connection, [changed], environment="staging", accept_reembed=True)

    registry.verify(connection, docs, "default")


def test_another_provider_of_the_same_model_is_no_other_recipe(
    connection: Connection, docs: Column
) -> None:
    moved = spec(embeddings=[embedding(provider="local")])

    registry.verify(connection, bound(connection, moved), "default")
    statements = migrate.migrate(connection, [moved])

    assert [s.why for s in statements] == ["register the changed provider of docs.embedding_4"]
    assert registry.registered(connection)[0].provider == "local"
    assert pending(connection, docs) == 0


def test_migrate_leaves_a_changed_column_and_goes_on_with_the_others(
    connection: Connection, docs: Column
) -> None:
    create_docs(connection, table="others")
    changed = spec(text="body || ' '")
    before = connection.execute("SELECT * FROM docs ORDER BY id").fetchall()

    with pytest.raises(IdentityError) as caught:
        migrate.migrate(
            connection,
            [changed, spec("others")],
            cost=lambda column, rows: f"about ${rows / 10:.2f}",
        )

    assert "20 rows would be embedded again, about $2.00" in str(caught.value)
    registry.verify(connection, bound(connection, spec("others")), "default")
    registry.verify(connection, docs, "default")
    assert connection.execute("SELECT * FROM docs ORDER BY id").fetchall() == before
    assert pending(connection, docs) == 0
    prepared = migrate.prepare(connection, [changed, spec("others")])
    assert prepared.statements == []
    assert len(prepared.problems) == 1


def test_only_the_rows_that_change_are_on_the_bill(connection: Connection, docs: Column) -> None:
    changed = spec(text="body || coalesce(meta ->> 'more', '')")
    connection.execute('UPDATE docs SET meta = \'{"more": "!"}\' WHERE id <= 3')

    with pytest.raises(IdentityError, match="3 rows would be embedded again"):
        migrate.migrate(connection, [changed])


def test_verify_puts_the_bill_into_its_error_where_it_is_asked_for(
    connection: Connection, docs: Column
) -> None:
    column = bound(connection, spec(text="body || ' '"))

    with pytest.raises(IdentityError, match="20 rows would be embedded again, a fortune"):
        registry.verify(connection, column, "default", cost=lambda column, rows: "a fortune")


def test_an_accepted_text_makes_its_rows_pending_and_keeps_the_vectors(
    connection: Connection, docs: Column
) -> None:
    changed = spec(text="body || coalesce(meta ->> 'more', '')", eligible="id <> 9")
    connection.execute('UPDATE docs SET meta = \'{"more": "!"}\' WHERE id <= 3')

    statements = migrate.migrate(connection, [changed], accept_reembed=True)

    column = bound(connection, changed)
    registry.verify(connection, column, "default")
    assert pending(connection, column) == 4
    assert value(connection, "SELECT count(embedding_4) FROM docs") == 20
    assert [s.sql.split('"')[0].strip() for s in statements] == [
        "CREATE INDEX CONCURRENTLY",
        "INSERT INTO embedding_pipeline.embedding_column\n    (table_schema, table_name, "
        "column_name, provider, model, dimensions, recipe,\n     expected_expression, environment)"
        "\nVALUES ('public', 'docs', 'embedding_4', 'tei', 'test-model-4', 4, '{",
        "DROP INDEX CONCURRENTLY",
        "ALTER INDEX",
    ]
    connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    plan = connection.execute(
        b"EXPLAIN SELECT count(*) FROM docs WHERE " + column.pending.as_bytes(connection)
    ).fetchall()
    assert "docs_embedding_4_pending" in str(plan)


def test_a_changed_prefix_can_be_accepted_since_the_model_is_the_same(
    connection: Connection, docs: Column
) -> None:
    prefixed = spec(embeddings=[embedding(prefix="passage: ")])
    assert "--accept-reembed" in refusal(connection, prefixed)

    migrate.migrate(connection, [prefixed], accept_reembed=True)

    column = bound(connection, prefixed)
    registry.verify(connection, column, "default")
    assert pending(connection, column) == 20


def test_a_text_spelled_differently_costs_nothing(connection: Connection, docs: Column) -> None:
    respelled = spec(text=" ( body::text ) ")
    assert "if only the spelling changed" in refusal(connection, respelled)

    statements = migrate.migrate(connection, [respelled])

    column = bound(connection, respelled)
    assert [s.why for s in statements] == ["register the changed text of docs.embedding_4"]
    registry.verify(connection, column, "default")
    assert pending(connection, column) == 0


def test_a_renamed_text_column_costs_nothing(connection: Connection, docs: Column) -> None:
    connection.execute("ALTER TABLE docs RENAME body TO content")
    renamed = spec(text="content")

    statements = migrate.migrate(connection, [renamed])

    assert [s.why for s in statements] == ["register the changed text of docs.embedding_4"]
    assert pending(connection, bound(connection, renamed)) == 0


def test_changed_partitions_rebuild_the_queue_and_nothing_else(
    connection: Connection, docs: Column
) -> None:
    hashed = spec(partitions={"by": "hash", "buckets": 4})

    statements = migrate.migrate(connection, [hashed])

    assert [s.sql.split()[0] for s in statements] == ["CREATE", "DROP", "ALTER"]
    assert pending(connection, bound(connection, hashed)) == 0


def test_reset_starts_a_column_anew(connection: Connection, docs: Column) -> None:
    other = spec(embeddings=[embedding(model="another-model", dimensions=3)])
    connection.execute(
        "INSERT INTO embedding_pipeline.quarantined_row (table_schema, table_name, column_name,"
        " key, fingerprint, error) VALUES ('public', 'docs', 'embedding_4', '[1]',"
        " gen_random_uuid(), 'refused')"
    )
    column = bound(connection, other)

    migrate.reset(connection, column)

    fresh = bound(connection, other)
    assert fresh.facts.columns["embedding_4"] == "public.vector(3)"
    registry.verify(connection, fresh, "default")
    assert pending(connection, fresh) == 20
    assert value(connection, "SELECT count(*) FROM embedding_pipeline.quarantined_row") == 0
    assert migrate.plan(connection, [other]) == []


def test_reset_leaves_another_environments_column(connection: Connection, docs: Column) -> None:
    with pytest.raises(IdentityError, match="belongs to environment default, not staging"):
        migrate.reset(connection, docs, environment="staging")

    assert pending(connection, docs) == 0


def test_reset_leaves_a_column_that_a_view_reads(connection: Connection, docs: Column) -> None:
    connection.execute("CREATE VIEW searched AS SELECT id, embedding_4 FROM docs")

    with pytest.raises(SchemaError, match="view searched depends on column embedding_4"):
        migrate.reset(connection, docs)

    registry.verify(connection, docs, "default")
    assert pending(connection, docs) == 0


def test_verify_is_one_query(database: str, connection: Connection, docs: Column) -> None:
    executed = []

    class Counting(psycopg.RawCursor[Any]):
        def execute(self, *args: Any, **options: Any) -> Any:
            executed.append(args[0])
            return super().execute(*args, **options)

    registry.verify(connection, docs, "default")  # the first one in a process asks the version
    with connect(database) as counted:
        counted.cursor_factory = Counting
        registry.verify(counted, docs, "default")

    assert len(executed) == 1
