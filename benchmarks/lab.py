"""A Postgres server of the benchmarks' own, databases made from templates, and what it costs.

Every measured run gets a fresh copy of a table that was made once, so that no run finds what
another left behind. Autovacuum is off: it would wake up in one round and not in the next.
"""

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg import sql

from benchmarks import corpus
from embedding_pipeline.local.postgres import ensure_postgres, stop_postgres
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.migrate import migrate

TABLE = "documents"


class Lab:
    """The server; a context manager. `lab.database(…)` gives fresh databases."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="bench-"))
        self.home.chmod(0o755)
        self.url = ""
        self._postmaster: psutil.Process | None = None
        self._templates: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.url = ensure_postgres(self.home)
        with connect(self.url) as connection:
            connection.execute("ALTER SYSTEM SET autovacuum = off")
            connection.execute("SELECT pg_reload_conf()")
            row = connection.execute("SELECT pg_backend_pid()").fetchone()
            assert row is not None
            self._postmaster = psutil.Process(row[0]).parent()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stop_postgres(self.home)
        shutil.rmtree(self.home, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """CPU time of every process of the server so far, those that ended included."""
        assert self._postmaster is not None
        while True:
            before = self._postmaster.cpu_times()
            total = sum(before[:4])  # user and system, of itself and of its children that ended
            for process in self._postmaster.children(recursive=True):
                with suppress(psutil.Error):
                    total += sum(process.cpu_times()[:2])
            if self._postmaster.cpu_times()[2:4] == before[2:4]:
                break  # else a session ended meanwhile and was counted nowhere, or twice
        return float(total)

    @contextmanager
    def database(self, name: str, fill: Callable[[str], None]) -> Iterator[str]:
        """The URL of a fresh copy of the database that `fill` made, once, under this name."""
        if name not in self._templates:
            self._templates[name] = self._create("template1")
            fill(self._templates[name])
            with connect(self._templates[name]) as connection:
                connection.execute("VACUUM ANALYZE")
                connection.execute("CHECKPOINT")
        copied = self._create(urlsplit(self._templates[name]).path[1:])
        try:
            yield copied
        finally:
            self.drop(copied)

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """The URL of a database with nothing but pgvector."""
        url = self._create("template1")
        try:
            yield url
        finally:
            self.drop(url)

    def forget(self, name: str) -> None:
        """Drop a template: the large ones take gigabytes."""
        if name in self._templates:
            self.drop(self._templates.pop(name))

    def drop(self, url: str) -> None:
        with connect(self.url) as connection:
            database = sql.Identifier(urlsplit(url).path[1:])
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(database))

    def _create(self, template: str) -> str:
        name = f"bench_{uuid.uuid4().hex[:12]}"
        with connect(self.url) as connection:
            # copied as files: through the WAL it would be written twice
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
            url = urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))
        with connect(url) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        return url


def table_spec(
    dimensions: int | list[int], *, by: dict[str, Any] | None = None, **changes: Any
) -> TableSpec:
    """The benchmarks' table with a column `embedding_<n>` for each width."""
    widths = dimensions if isinstance(dimensions, list) else [dimensions]
    values: dict[str, Any] = {
        "table": TABLE,
        "id_column": "id",
        "text": "body",
        "partitions": by or {"by": "hash", "buckets": 8},
        "embeddings": [
            {
                "column": f"embedding_{width}",
                "dimensions": width,
                "provider": "openai",
                "model": "text-embedding-3-small",
                "batch_size": 64,
                "concurrency": 32,
            }
            for width in widths
        ],
    }
    return TableSpec.model_validate(values | changes)


def load_documents(
    connection: "psycopg.Connection[Any]",
    rows: int,
    *,
    key: str = "bigint",
    write: Callable[[int], str] = corpus.text,
    tenants: int = 0,
) -> None:
    """The source table with `rows` rows numbered from 1; no embedding column yet."""
    connection.execute(
        sql.SQL("CREATE TABLE {} (id {} PRIMARY KEY, body text NOT NULL, tenant text)").format(
            sql.Identifier(TABLE), sql.SQL(key)
        )
    )
    copy_documents(connection, range(1, rows + 1), key=key, write=write, tenants=tenants)


def copy_documents(
    connection: "psycopg.Connection[Any]",
    numbers: range,
    *,
    key: str = "bigint",
    write: Callable[[int], str] = corpus.text,
    tenants: int = 0,
) -> None:
    """Add rows with these numbers by COPY."""
    command = sql.SQL("COPY {} (id, body, tenant) FROM STDIN").format(sql.Identifier(TABLE))
    with connection.cursor() as cursor, cursor.copy(command) as copy:
        for number in numbers:
            name = corpus.uuid_key(number) if key == "uuid" else number
            tenant = f"tenant-{number % tenants:04d}" if tenants else None
            copy.write_row((name, write(number), tenant))


def make_documents(
    url: str, spec: TableSpec, rows: int, *, embedded: bool = False, **loading: Any
) -> None:
    """A migrated table of `rows` rows, none embedded, or all with some vector."""
    with connect(url) as connection:
        load_documents(connection, 0, **{k: v for k, v in loading.items() if k == "key"})
        migrate(connection, [spec])
        columns = bind_columns(connection, spec)
        if not embedded:
            copy_documents(connection, range(1, rows + 1), **loading)
            return
        _fill_embedded(connection, columns, rows, loading)


def _fill_embedded(
    connection: "psycopg.Connection[Any]", columns: list[Column], rows: int, loading: dict[str, Any]
) -> None:
    """Rows that are up to date from the start: each is written once, in its final form."""
    target = columns[0].relation
    with connection.transaction():
        connection.execute(
            sql.SQL("CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS SELECT * FROM {}").format(
                target
            )
        )
        command = sql.SQL("COPY pg_temp.incoming (id, body, tenant) FROM STDIN")
        tenants = loading.get("tenants", 0)
        write = loading.get("write", corpus.text)
        with connection.cursor() as cursor, cursor.copy(command) as copy:
            for number in range(1, rows + 1):
                tenant = f"tenant-{number % tenants:04d}" if tenants else None
                copy.write_row((number, write(number), tenant))
        names = [name for column in columns for name in (column.vector, column.fingerprint)]
        values: list[sql.Composable] = []
        for column in columns:
            values.append(_some_vector(column))
            values.append(column.expected)
        connection.execute(
            sql.SQL(
                "INSERT INTO {target} (id, body, tenant, {names})"
                " SELECT id, body, tenant, {values} FROM pg_temp.incoming"
            ).format(
                target=target,
                names=sql.SQL(", ").join(names),
                values=sql.SQL(", ").join(values),
            )
        )


def _some_vector(column: Column) -> sql.Composable:
    """Some vector for each row: random where it is narrow, else the same for all."""
    width = column.embedding.dimensions
    if width <= 16:
        drawn = sql.SQL(", ").join([sql.SQL("random() - 0.5")] * width)
        return sql.SQL("ARRAY[{}]::{}").format(drawn, column.vector_type)
    ones = "[" + ",".join(["1"] * width) + "]"
    return sql.SQL("{}::{}").format(sql.Literal(ones), column.vector_type)


def column_of(url: str, spec: TableSpec, number: int = 0) -> Column:
    """The spec's embedding column, bound to the database."""
    with connect(url) as connection:
        return bind_columns(connection, spec)[number]
