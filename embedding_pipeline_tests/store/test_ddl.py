"""Taking turns, waiting, and what a schema change leaves in the session."""

from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import ddl, migrate
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.sessions import open_transaction, value, wait_until
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]


def test_a_turn_is_exclusive_for_its_table_only(connection: Connection) -> None:
    reports: list[str] = []
    with ddl.turn(connection, 4_000_000_000, "table a"):
        with ddl.turn(connection, 5, "table b", report=reports.append):
            assert reports == []
        with (
            pytest.raises(SchemaError, match="another schema change of table a does not end"),
            ddl.turn(connection, 4_000_000_000, "table a", report=reports.append, patience=0.1),
        ):
            pass
    assert reports == ["waiting for another schema change of table a to end"]
    with ddl.turn(connection, 4_000_000_000, "table a", patience=0):
        pass


def test_whoever_has_the_turn_holds_no_snapshot(connection: Connection) -> None:
    """CREATE INDEX CONCURRENTLY would wait for it, and so for itself."""
    with ddl.turn(connection, 5, "a table"):
        held = connection.execute(
            "SELECT a.state, a.backend_xmin, a.backend_xid FROM pg_locks l"
            " JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory' AND l.objid = 5 AND l.granted"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchall()
    assert held == [("idle in transaction", None, None)]


def test_only_settings_that_differ_are_touched(connection: Connection) -> None:
    connection.execute("SET lock_timeout = '7s'")

    with ddl.session_settings(connection, {"lock_timeout": "0", "statement_timeout": "0"}):
        assert value(connection, "SHOW lock_timeout") == "0"
        # a pooler's connection keeps what is set, so that nothing is set without need
        assert (
            value(connection, "SELECT source FROM pg_settings WHERE name = 'statement_timeout'")
            == "default"
        )

    assert value(connection, "SHOW lock_timeout") == "7s"


def test_an_autovacuum_of_hours_makes_way(database: str, connection: Connection) -> None:
    """It yields to whoever waits for a second, and an ALTER waits a fifth of that."""
    create_docs(connection, rows=20_000)
    connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
    connection.execute("SELECT pg_reload_conf()")
    connection.execute(
        "ALTER TABLE docs SET (autovacuum_vacuum_threshold = 0,"
        " autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 100,"
        " autovacuum_vacuum_cost_limit = 1)"
    )
    connection.execute("DELETE FROM docs WHERE id % 2 = 0")
    working = "SELECT count(*) FROM pg_stat_progress_vacuum WHERE relid = 'docs'::regclass"
    try:
        wait_until(lambda: value(connection, working) == 1, "the autovacuum")

        migrate.migrate(connection, [spec()], patience=20)
    finally:
        connection.execute("ALTER SYSTEM RESET autovacuum_naptime")
        connection.execute("SELECT pg_reload_conf()")
    assert migrate.plan(connection, [spec()]) == []


def test_a_table_that_is_locked_is_said_so_and_left(database: str, connection: Connection) -> None:
    create_docs(connection)
    with (
        open_transaction(database, "LOCK TABLE docs IN ACCESS EXCLUSIVE MODE"),
        connect(database) as mine,
        pytest.raises(SchemaError, match=r"table docs.* locked"),
    ):
        migrate.migrate(mine, [spec()], patience=0)

    migrate.migrate(connection, [spec()])
