"""Jobs for `worker.py` that need Dagster: runs and sensor ticks in this process."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from benchmarks.jobs import core, warm
from benchmarks.lab import TABLE, column_of
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.partitions import static_keys
from embedding_pipeline.store.pending import count_by_partition

Task = Mapping[str, Any]
Result = dict[str, Any]


def dagster_runs(task: Task) -> Callable[[], Result]:
    """The same rows embedded by the core, by a run in this process and by one of its own."""
    import dagster as dg

    from embedding_pipeline.definitions import defs

    spec = TableSpec.model_validate(task["spec"])
    key = dg.AssetKey([spec.asset_name, spec.embeddings[0].column])
    instance = dg.DagsterInstance.get()
    repository = defs().get_repository_def()
    job = repository.get_implicit_job_def_for_assets([key])
    assert job is not None
    keys = static_keys(spec)
    assert keys is not None
    first, last = keys[0], keys[-1]
    tags = {
        "dagster/asset_partition_range_start": first,
        "dagster/asset_partition_range_end": last,
    }

    def change() -> None:
        with connect(task["url"]) as connection:
            connection.execute(f"UPDATE {TABLE} SET body = body || ' again'".encode())

    def inside() -> float:
        began = time.perf_counter()
        result = job.get_subset(asset_selection={key}).execute_in_process(
            instance=instance, tags=tags, asset_selection=[key]
        )
        assert result.success
        return time.perf_counter() - began

    def process() -> float:
        command = ["asset", "materialize", "-m", "embedding_pipeline.definitions"]
        command += ["--select", key.to_user_string(), "--partition-range", f"{first}...{last}"]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dagster", *command], check=True, capture_output=True)
        return time.perf_counter() - began

    def left() -> None:
        with connect(task["url"]) as connection:
            pending = count_by_partition(connection, bind_columns(connection, spec)[0])
        assert not pending, pending

    def work() -> Result:
        direct = core(task)
        began = time.perf_counter()
        began_cpu = _cpu()
        direct()
        found: Result = {"core": time.perf_counter() - began, "core_cpu": _cpu() - began_cpu}
        left()
        change()
        inside()  # the first in a process creates tables and loads what later ones use
        left()
        change()
        began_cpu = _cpu()
        found["inside"] = inside()
        found["inside_cpu"] = _cpu() - began_cpu
        left()
        change()
        began_cpu = _cpu()
        found["process"] = process()
        found["process_cpu"] = _cpu() - began_cpu
        left()
        return found

    return work


def _cpu() -> float:
    """CPU-seconds of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def bulk_run(task: Task) -> Callable[[], Result]:
    """Every pending row by one run of all partitions, inside this process."""
    import dagster as dg

    from embedding_pipeline.definitions import defs

    spec = TableSpec.model_validate(task["spec"])
    key = dg.AssetKey([spec.asset_name, spec.embeddings[0].column])
    asyncio.run(warm(task, column_of(task["url"], spec)))
    instance = dg.DagsterInstance.get()
    instance.get_runs(limit=1)  # its tables are made here, not by the clock
    job = defs().get_repository_def().get_implicit_job_def_for_assets([key])
    keys = static_keys(spec)
    assert job is not None
    assert keys is not None
    tags = {
        "dagster/asset_partition_range_start": keys[0],
        "dagster/asset_partition_range_end": keys[-1],
    }

    def work() -> Result:
        done = job.get_subset(asset_selection={key}).execute_in_process(
            instance=instance, tags=tags, asset_selection=[key]
        )
        return {"stopped": None if done.success else "the run failed"}

    return work


def ticks(task: Task) -> Callable[[], Result]:
    """Ticks of the sensor with nothing pending and with a row pending in every tenth tenant."""
    import dagster as dg

    from embedding_pipeline.components.sensor import table_sensor
    from embedding_pipeline.spec_files import all_table_files

    spec = TableSpec.model_validate(task["spec"])
    [file] = [file for file in all_table_files() if file.spec.table == spec.table]
    instance = dg.DagsterInstance.get()
    sensor = table_sensor(file)

    def tick() -> float:
        with dg.build_sensor_context(instance=instance) as context:
            began = time.perf_counter()
            data = sensor.evaluate_tick(context)
            took = time.perf_counter() - began
        assert data.skip_message or data.run_requests, data
        return 1000 * took

    def queries(connection: "psycopg.Connection[Any]") -> float:
        columns = bind_columns(connection, spec)
        began = time.perf_counter()
        for column in columns:
            count_by_partition(connection, column)
        return 1000 * (time.perf_counter() - began)

    def work() -> Result:
        found: Result = {}
        with connect(task["url"]) as connection:
            for what in ("nothing", "some"):
                if what == "some":
                    connection.execute(
                        f"UPDATE {TABLE} SET body = body || ' again'"
                        " WHERE id % 10 = 0 AND id <= $1".encode(),
                        [task["tenants"]],
                    )
                tick()
                found[what] = [tick() for _ in range(task["repeats"])]
                found[f"{what}_queries"] = [queries(connection) for _ in range(task["repeats"])]
        return found

    return work
