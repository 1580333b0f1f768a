"""The project's own schema and the pgvector extension, as this code needs them."""

from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.ddl import Statement

Connection = psycopg.Connection[Any]


def vector_schema(connection: Connection) -> str | None:
    """The schema that pgvector is installed in; None when it is not."""
    row = connection.execute(
        b"SELECT n.nspname FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace "
        b"WHERE x.extname = 'vector'"
    ).fetchone()
    return row[0] if row else None


def version(connection: Connection) -> int | None:
    """The version of the project's tables; None without the schema, 0 for an empty one."""
    row = connection.execute(sqlfiles.query("catalogue/project")).fetchone()
    assert row is not None
    has_schema, has_version = row
    if not has_schema:
        return None
    if not has_version:
        return 0
    row = connection.execute(
        b"SELECT coalesce(max(version), 0) FROM embedding_pipeline.schema_version"
    ).fetchone()
    assert row is not None
    found: int = row[0]
    return found


_current: set[tuple[str, int, str]] = set()


def require_current(connection: Connection) -> None:
    """SchemaError unless the project's tables are those that this code was written for.

    Two queries, once for each database.
    """
    where = (connection.info.host, connection.info.port, connection.info.dbname)
    if where in _current:
        return
    found, newest = version(connection), sqlfiles.numbered("project")[-1][0]
    if not found:
        raise SchemaError("this database is not set up; run `embedding-pipeline migrate`")
    if found < newest:
        raise SchemaError(
            f"the project's tables in this database are version {found}, this code needs {newest}; "
            "run `embedding-pipeline migrate`"
        )
    _current.add(where)


def plan_extension(connection: Connection) -> tuple[list[Statement], str]:
    """The statement that installs pgvector where it is missing, and the schema it is in then."""
    schema = vector_schema(connection)
    if schema is not None:
        return [], schema
    row = connection.execute(sqlfiles.query("catalogue/extension")).fetchone()
    assert row is not None
    available, schema = row
    if not available:
        raise SchemaError(
            "this server has no pgvector: install it on the server (package "
            "postgresql-<version>-pgvector, or switch it on at your host), then run this again"
        )
    return [
        Statement(
            sqlfiles.compose("extension", schema=sql.Identifier(schema)).as_string(connection),
            f"install pgvector in schema {schema}",
        )
    ], schema


def plan_project(connection: Connection) -> list[Statement]:
    """The statements that bring the project's own schema up to date."""
    found = version(connection)
    files = sqlfiles.numbered("project")
    newest = files[-1][0]
    if found is not None and found > newest:
        raise SchemaError(
            f"this database was set up by a newer version of this project (its tables are version "
            f"{found}, this code knows {newest}); update the code"
        )
    steps = []
    if found is None:
        steps.append(
            Statement(
                sqlfiles.compose("project/create_schema").as_string(connection),
                "create the project's schema",
            )
        )
    for number, name in files:
        if number > (found or 0):
            steps.append(
                Statement(sqlfiles.read(name), f"bring the project's tables to version {number}")
            )
    return steps
