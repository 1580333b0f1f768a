"""Dagster's storage in Postgres (dagster-postgres), with the embedded server as its default.

`dagster.yaml` names this class, so that plain `dagster dev` in a clone finds the same instance as
the command line does, with no variable set.
"""

from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage
from dagster_postgres.utils import create_pg_engine

from embedding_pipeline.settings import load_settings

SCHEMA = "dagster"


class PostgresStorage(DagsterPostgresStorage):
    """Run, event and schedule storage at `dagster_url()`."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls,
        inst_data: ConfigurableClassData | None,
        config_value: Any,  # noqa: ARG003 - Dagster's signature; there is nothing to configure
    ) -> Self:
        storage = cls(
            postgres_url=dagster_url(), should_autocreate_tables=True, inst_data=inst_data
        )
        storage.keep_connections()
        return storage

    def keep_connections(self) -> None:
        """Let the three storages share a pool of connections.

        dagster-postgres opens one for each statement: 142 in a run of ten rows, a fifth of its
        time. One stays open here, more while threads need them, and one that the server has
        closed is replaced unnoticed.
        """
        engine = create_pg_engine(
            self.postgres_url,
            isolation_level="AUTOCOMMIT",
            pool_size=1,
            max_overflow=-1,
            pool_pre_ping=True,
            pool_recycle=600,
        )
        for storage in (self._run_storage, self._event_log_storage, self._schedule_storage):
            storage._engine = engine


def dagster_url() -> str:
    """Where Dagster keeps its runs and events; made if it is not there yet.

    DAGSTER_DATABASE_URL as it is; else the schema `dagster` in DATABASE_URL's database; else the
    database `dagster` of the embedded server.
    """
    settings = load_settings()
    if settings.dagster_database_url is not None:
        return settings.dagster_database_url.get_secret_value()
    if settings.database_url is not None:
        url = settings.database_url.get_secret_value()
        _ensure_schema(url)
        return with_search_path(url, SCHEMA)
    from embedding_pipeline.local.postgres import postgres_url

    return postgres_url(settings.embedding_pipeline_home, database="dagster")


def with_search_path(url: str, schema: str) -> str:
    """The same connection string with a search path, kept apart from other options in it."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    query["options"] = f"{query.get('options', '')} -csearch_path={schema}".strip()
    return urlunsplit(parts._replace(query=urlencode(query)))


def _ensure_schema(url: str) -> None:
    from psycopg import sql

    from embedding_pipeline.store.connection import connect

    with connect(url) as connection:
        # asked first: CREATE SCHEMA IF NOT EXISTS wants the CREATE right even when it exists
        known = connection.execute("SELECT to_regnamespace($1)", [SCHEMA]).fetchone()
        if known == (None,):
            connection.execute(
                sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(SCHEMA))
            )
