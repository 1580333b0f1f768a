"""Dagster's storage over real connections."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import event

from embedding_pipeline.dagster_storage import PostgresStorage, with_search_path
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.conftest import Environment


@pytest.fixture
def storage(database: str, environment: Environment) -> Iterator[PostgresStorage]:
    environment(DATABASE_URL=database)
    storage = PostgresStorage.from_config_value(None, {})
    yield storage
    storage.run_storage.dispose()


@pytest.fixture
def connections(storage: PostgresStorage) -> list[object]:
    """Every connection that the storage opens from here on."""
    opened: list[object] = []
    storages = (storage.run_storage, storage.event_log_storage, storage.schedule_storage)
    engines: dict[int, Any] = {}
    for each in storages:
        engine = vars(each)["_engine"]
        engines[id(engine)] = engine
    for engine in engines.values():
        event.listen(engine, "connect", lambda connection, _: opened.append(connection))
    return opened


def use(storage: PostgresStorage) -> None:
    storage.run_storage.get_runs()
    storage.event_log_storage.get_dynamic_partitions("some partitions")
    storage.schedule_storage.all_instigator_state()


def test_one_connection_serves_many_statements(
    storage: PostgresStorage, connections: list[object]
) -> None:
    for _ in range(20):
        use(storage)
    assert len(connections) == 1


def test_a_connection_that_the_server_closed_is_replaced_unnoticed(
    storage: PostgresStorage, connections: list[object], database: str
) -> None:
    use(storage)
    with connect(database) as connection:
        ended = connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
    assert ended is not None
    assert ended[0] >= 1
    use(storage)
    assert len(connections) == 2


def test_what_one_storage_writes_the_others_read_at_once(storage: PostgresStorage) -> None:
    storage.event_log_storage.add_dynamic_partitions("tenants", ["b", "a"])
    assert storage.event_log_storage.get_dynamic_partitions("tenants") == ["b", "a"]
    run = dg.DagsterRun(job_name="some_job")
    storage.run_storage.add_run(run)
    [found] = storage.run_storage.get_runs(dg.RunsFilter(run_ids=[run.run_id]))
    assert found.job_name == "some_job"


def test_the_search_path_joins_other_options() -> None:
    url = with_search_path("postgresql://u@h/d?options=-cgeqo%3Doff", "dagster")
    assert "geqo%3Doff+-csearch_path%3Ddagster" in url
