"""HNSW indexes, and the care of the pending index."""

import re
import time
from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import ddl, indexes, migrate
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.sessions import open_transaction, value, wait_until
from embedding_pipeline_tests.store.test_migrate import create_partitioned, in_thread, is_waiting
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]


def set_up(connection: Connection, rows: int = 500, table: TableSpec | None = None) -> Column:
    """A migrated table with a vector in every row."""
    table = table or spec()
    create_docs(connection, rows)
    migrate.migrate(connection, [table])
    column = bind_columns(connection, table)[0]
    fill(connection, column)
    return column


def set_up_wide(connection: Connection) -> Column:
    """Rows enough that a build takes a second or more."""
    table = spec(embeddings=[embedding("embedding_384", 384)])
    create_docs(connection, 3000)
    migrate.migrate(connection, [table])
    connection.execute(
        "UPDATE docs SET embedding_384 = (SELECT array_agg(sin(id * n)) FROM"
        " generate_series(1, 384) AS n)::vector"
    )
    return bind_columns(connection, table)[0]


def fill(connection: Connection, column: Column) -> None:
    schema = column.facts.vector_schema
    connection.execute(
        f'UPDATE docs SET embedding_4 = ARRAY[random(), random(), random(), 1]::"{schema}".vector,'
        " embedding_4_fingerprint = ".encode()
        + column.expected.as_bytes(connection)
    )


def nearest(connection: Connection, *, through_index: bool) -> list[int]:
    with connection.transaction():
        connection.execute(f"SET LOCAL enable_indexscan = {through_index}")
        connection.execute(f"SET LOCAL enable_seqscan = {not through_index}")
        query = "SELECT id FROM docs ORDER BY embedding_4 <=> '[1,0,0,1]' LIMIT 5"
        plan = str(connection.execute("EXPLAIN " + query).fetchall())
        assert ("docs_embedding_4_hnsw" in plan) == through_index
        return [key for (key,) in connection.execute(query)]


def test_a_built_index_finds_the_nearest_rows(connection: Connection) -> None:
    column = set_up(connection)
    assert indexes.index_state(connection, column).state == "missing"
    reports: list[str] = []

    report = indexes.build_hnsw(connection, column, report=reports.append)

    assert report.built
    assert report.index == "docs_embedding_4_hnsw"
    assert report.rows == 500
    assert report.size_bytes > 8192
    assert reports[0] == "build the hnsw index docs_embedding_4_hnsw of docs.embedding_4"
    state = indexes.index_state(connection, column)
    assert (state.state, state.rows) == ("valid", 500)
    assert nearest(connection, through_index=True) == nearest(connection, through_index=False)


def test_a_graph_that_outgrows_its_memory_says_so_while_it_is_built(
    connection: Connection,
) -> None:
    """Such a build takes many times as long, and what helps is the server's to set."""
    column = set_up_wide(connection)
    connection.execute("SET maintenance_work_mem = '4MB'")
    said: list[str] = []
    done = indexes.build_hnsw(
        connection, column, report=said.append, parallel_workers=0, maintenance_work_mem="4MB"
    )
    assert done.built
    [heard] = [line for line in said if "no longer fits into maintenance_work_mem" in line]
    assert heard.startswith("docs.embedding_384: Postgres says: ")
    assert "Increase maintenance_work_mem" in heard
    assert done.notices in heard


@pytest.mark.parametrize(
    ("rows", "dimensions", "cache_gb", "megabytes"),
    [
        (0, 1536, 4, 64),  # never less than Postgres's own default
        (50_000, 1536, 4, 410),
        (1_000_000, 384, 1, 512),  # nobody says that the server has more
        (1_000_000, 384, 4, 2048),
        (1_000_000, 384, 24, 2725),
    ],
)
def test_a_build_takes_the_memory_that_its_graph_needs(
    rows: int, dimensions: int, cache_gb: int, megabytes: int
) -> None:
    asked = indexes.build_memory(rows, dimensions, cache_gb * 1024**3)
    assert asked // 1024**2 == megabytes


def test_a_graph_that_outgrew_the_servers_own_setting_is_built_in_memory(
    connection: Connection,
) -> None:
    """The same rows as above, where 4 MB were asked for: the build finds out what it needs."""
    column = set_up_wide(connection)
    connection.execute("SET maintenance_work_mem = '4MB'")
    said: list[str] = []
    built = indexes.build_hnsw(connection, column, report=said.append, parallel_workers=0)
    assert built.memory_mb >= 64
    assert not any("no longer fits" in line for line in said)


def test_how_far_a_build_is_can_be_seen_while_it_runs(
    database: str, connection: Connection
) -> None:
    column = set_up_wide(connection)
    shares: list[int] = []

    def see() -> bool:
        said = ddl.progress(connection, pid) or ""
        if found := re.fullmatch(r"building index: loading tuples, (\d+) %", said):
            shares.append(int(found[1]))
        return building.done()

    with connect(database) as builder:
        pid = builder.info.backend_pid
        building = in_thread(lambda: indexes.build_hnsw(builder, column, parallel_workers=0))
        wait_until(see, "the build to end")
        assert building.result().built
    assert len(set(shares)) > 2, shares
    assert shares == sorted(shares)


def test_a_valid_index_is_left_alone(connection: Connection) -> None:
    column = set_up(connection)
    indexes.build_hnsw(connection, column)
    query = "SELECT oid FROM pg_class WHERE relname = 'docs_embedding_4_hnsw'"
    before = value(connection, query)

    assert not indexes.build_hnsw(connection, column).built
    assert value(connection, query) == before
    assert migrate.plan(connection, [spec()]) == []


def test_an_index_that_the_user_has_built_counts(connection: Connection) -> None:
    column = set_up(connection)
    connection.execute("CREATE INDEX mine ON docs USING hnsw (embedding_4 vector_cosine_ops)")

    assert not indexes.build_hnsw(connection, column).built
    assert indexes.index_state(connection, column).name == "mine"


def test_an_index_by_another_distance_does_not_count(connection: Connection) -> None:
    column = set_up(connection)
    connection.execute("CREATE INDEX mine ON docs USING hnsw (embedding_4 vector_l2_ops)")
    assert indexes.index_state(connection, column).state == "missing"

    assert indexes.build_hnsw(connection, column).built

    assert value(connection, "SELECT count(*) FROM pg_indexes WHERE indexname = 'mine'") == 1


def test_an_index_of_ours_by_name_only_is_not_dropped(connection: Connection) -> None:
    column = set_up(connection)
    connection.execute(
        "CREATE INDEX docs_embedding_4_hnsw ON docs USING hnsw (embedding_4 vector_l2_ops)"
    )

    with pytest.raises(SchemaError, match="hnsw index would be called docs_embedding_4_hnsw, but"):
        indexes.build_hnsw(connection, column)


def test_an_invalid_left_over_is_rebuilt(database: str, connection: Connection) -> None:
    column = set_up(connection)
    with (
        connect(database) as builder,
        open_transaction(database, "UPDATE docs SET tenant = 'b' WHERE id = 1"),
    ):
        pid = builder.info.backend_pid
        building = in_thread(lambda: indexes.build_hnsw(builder, column))
        wait_until(lambda: is_waiting(connection, pid), "the build to wait")
        # as a crash of the process would: the session ends in the middle of the build
        connection.execute("SELECT pg_terminate_backend($1)", [pid])
        with pytest.raises(SchemaError, match="Run this again: it goes on where it stopped"):
            building.result()
    assert indexes.index_state(connection, column).state == "invalid"

    assert indexes.build_hnsw(connection, column).built

    assert indexes.index_state(connection, column).state == "valid"


def test_a_build_that_waits_reports_for_whom(database: str, connection: Connection) -> None:
    column = set_up(connection)
    reports: list[str] = []
    with (
        connect(database) as builder,
        open_transaction(database, "UPDATE docs SET tenant = 'b' WHERE id = 1") as holder,
    ):
        pid = holder.info.backend_pid
        building = in_thread(lambda: indexes.build_hnsw(builder, column, report=reports.append))
        wait_until(lambda: any(f"waiting for pid {pid}" in r for r in reports), "a report")
        holder.rollback()
        assert building.result().built


def test_two_columns_indexes_are_built_one_after_the_other(
    database: str, connection: Connection
) -> None:
    """Two CREATE INDEX CONCURRENTLY on one table wait for each other until one is shot."""
    table = spec(embeddings=[embedding(), embedding("other", 3)])
    set_up(connection, 3000, table)
    connection.execute("UPDATE docs SET other = '[1,2,3]'")
    columns = bind_columns(connection, table)

    def build(column: Column) -> indexes.IndexReport:
        with connect(database) as mine:
            return indexes.build_hnsw(mine, column)

    builds = [in_thread(lambda column=column: build(column)) for column in columns]  # type: ignore[misc]

    assert all(running.result().built for running in builds)
    assert [indexes.index_state(connection, column).state for column in columns] == ["valid"] * 2


def test_settings_of_the_session_are_put_back(connection: Connection) -> None:
    column = set_up(connection)
    connection.execute("SET maintenance_work_mem = '33MB'; SET lock_timeout = '7s'")
    names = (
        "maintenance_work_mem",
        "max_parallel_maintenance_workers",
        "min_parallel_table_scan_size",
        "lock_timeout",
        "statement_timeout",
    )
    before = [value(connection, f"SHOW {name}") for name in names]

    indexes.build_hnsw(connection, column, maintenance_work_mem="64MB")

    assert [value(connection, f"SHOW {name}") for name in names] == before


def test_too_little_shared_memory_costs_only_the_parallel_workers(connection: Connection) -> None:
    """A container's 64 MB of /dev/shm: could not resize shared memory segment."""
    if value(connection, "SHOW dynamic_shared_memory_type") != "posix":
        pytest.skip("this server does not keep shared memory in /dev/shm")
    column = set_up(connection)
    reports: list[str] = []

    report = indexes.build_hnsw(
        connection, column, report=reports.append, maintenance_work_mem="1TB"
    )

    assert report.built
    assert not report.parallel
    assert any("building it without parallel workers" in line for line in reports)
    assert indexes.index_state(connection, column).state == "valid"


def test_pgvector_in_another_schema(bare_database: str) -> None:
    with connect(bare_database) as connection:
        connection.execute("CREATE SCHEMA extensions")
        column = set_up(connection)

        assert indexes.build_hnsw(connection, column).built
        assert indexes.index_state(connection, column).state == "valid"


def test_a_quoted_column(connection: Connection) -> None:
    connection.execute('CREATE TABLE "T 1" (id int PRIMARY KEY, body text, tenant text)')
    table = spec("T 1", embeddings=[embedding('E "x"')])
    migrate.migrate(connection, [table])
    column = bind_columns(connection, table)[0]

    assert indexes.build_hnsw(connection, column).built
    assert not indexes.build_hnsw(connection, column).built


def test_a_partitioned_table(connection: Connection) -> None:
    create_partitioned(connection)
    migrate.migrate(connection, [spec()])
    column = bind_columns(connection, spec())[0]
    fill(connection, column)

    report = indexes.build_hnsw(connection, column)

    assert report.built
    assert report.rows == 199
    assert not indexes.build_hnsw(connection, column).built
    assert indexes.drop_hnsw(connection, column)
    assert indexes.index_state(connection, column).state == "missing"


def test_dropping_says_whether_there_was_one(connection: Connection) -> None:
    column = set_up(connection)
    indexes.build_hnsw(connection, column)

    assert indexes.drop_hnsw(connection, column)
    assert not indexes.drop_hnsw(connection, column)
    assert indexes.index_state(connection, column).state == "missing"


def pending_index(connection: Connection) -> tuple[int, int]:
    """Oid (which a rebuild keeps) and size of the pending index."""
    row = connection.execute(
        "SELECT pg_relation_filenode(oid), pg_relation_size(oid) FROM pg_class"
        " WHERE relname = 'docs_embedding_4_pending'"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_a_bloated_pending_index_is_rebuilt_after_a_bulk_run(connection: Connection) -> None:
    column = set_up(connection, 60_000)
    _, bloated = pending_index(connection)
    assert bloated > indexes.BLOATED_BYTES

    assert indexes.vacuum(connection, column)
    assert indexes.reindex_pending_if_bloated(connection, column)

    _, size = pending_index(connection)
    assert size <= 2 * 8192
    assert not indexes.reindex_pending_if_bloated(connection, column)
    assert migrate.plan(connection, [spec()]) == []


def test_a_pending_index_full_of_pending_rows_is_not_bloated(connection: Connection) -> None:
    create_docs(connection, 60_000)
    migrate.migrate(connection, [spec()])
    column = bind_columns(connection, spec())[0]
    assert pending_index(connection)[1] > indexes.BLOATED_BYTES

    indexes.vacuum(connection, column)

    assert not indexes.reindex_pending_if_bloated(connection, column)


def test_what_a_failed_rebuild_left_is_dropped(database: str, connection: Connection) -> None:
    column = set_up(connection, 60_000)
    indexes.vacuum(connection, column)
    with (
        connect(database) as builder,
        open_transaction(database, "UPDATE docs SET tenant = 'b' WHERE id = 1"),
    ):
        pid = builder.info.backend_pid
        rebuilding = in_thread(
            lambda: builder.execute("REINDEX INDEX CONCURRENTLY docs_embedding_4_pending")
        )
        wait_until(lambda: is_waiting(connection, pid), "the rebuild to wait")
        connection.execute("SELECT pg_cancel_backend($1)", [pid])
        with pytest.raises(psycopg.errors.QueryCanceled):
            rebuilding.result()
    left = "SELECT count(*) FROM pg_class WHERE relname ~ '_ccnew'"
    assert value(connection, left) == 1

    assert indexes.reindex_pending_if_bloated(connection, column)

    assert value(connection, left) == 0


def test_a_rebuild_does_not_wait_for_an_old_transaction(
    database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = set_up(connection, 60_000)
    indexes.vacuum(connection, column)
    monkeypatch.setattr(indexes, "OLD_SNAPSHOT_SECONDS", 0)
    reports: list[str] = []
    with open_transaction(
        database, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT count(*) FROM docs"
    ) as holder:
        assert not indexes.reindex_pending_if_bloated(connection, column, report=reports.append)
        assert f"the open transaction of pid {holder.info.backend_pid}" in reports[0]

    assert indexes.reindex_pending_if_bloated(connection, column)


def test_vacuum_waits_for_nobody_and_says_so(database: str, connection: Connection) -> None:
    column = set_up(connection)
    reports: list[str] = []
    with open_transaction(database, "LOCK TABLE docs IN SHARE UPDATE EXCLUSIVE MODE"):
        started = time.monotonic()
        assert not indexes.vacuum(connection, column, report=reports.append)
        assert time.monotonic() - started < 5

    assert reports == ['docs.embedding_4: skipping vacuum of "docs" --- lock not available']
    assert indexes.vacuum(connection, column)
