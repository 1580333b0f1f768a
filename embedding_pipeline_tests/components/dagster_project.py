"""Tables in Dagster with an instance of their own: sensors ticked and runs launched by hand."""

from collections.abc import Sequence
from datetime import datetime

import dagster as dg

from embedding_pipeline.components import names
from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.spec_files import TableFile


class DagsterProject:
    """What daemon and run workers do, one step at a time, in this process."""

    def __init__(self, files: Sequence[TableFile], *further: dg.Definitions) -> None:
        self.files = list(files)
        # not an ephemeral one, which schedules do not take
        self.instance = dg.DagsterInstance.local_temp()
        definitions = dg.Definitions.merge(*map(table_definitions, files), *further)
        self.repository = definitions.get_repository_def()
        self.job = definitions.resolve_implicit_global_asset_job_def()

    def tick(self, sensor: str) -> tuple[list[dg.RunRequest], str]:
        """What a sensor asks for now, and why not more."""
        context = dg.build_sensor_context(
            instance=self.instance, repository_def=self.repository, sensor_name=sensor
        )
        said = self.repository.get_sensor_def(sensor).evaluate_tick(context)
        return list(said.run_requests or []), said.skip_message or ""

    def start_schedule(self, schedule: str, at: datetime) -> tuple[list[dg.RunRequest], str]:
        """What a schedule asks for at this time."""
        context = dg.build_schedule_context(
            instance=self.instance, repository_def=self.repository, scheduled_execution_time=at
        )
        said = self.repository.get_schedule_def(schedule).evaluate_tick(context)
        return list(said.run_requests or []), said.skip_message or ""

    def launch(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """Execute a run that a tick asked for."""
        subset = self.job.get_subset(
            asset_selection=set(request.asset_selection or []),
            asset_check_selection=set(request.asset_check_keys or []),
        )
        return subset.execute_in_process(
            instance=self.instance,
            tags=dict(request.tags),
            run_config=dict(request.run_config),
            raise_on_error=False,
        )

    def settle(self, *sensors: str, most: int = 20) -> list[dg.ExecuteInProcessResult]:
        """Tick and launch until nobody asks for anything."""
        done: list[dg.ExecuteInProcessResult] = []
        for _ in range(most):
            requests = [request for sensor in sensors for request in self.tick(sensor)[0]]
            if not requests:
                return done
            done += map(self.launch, requests)
        raise AssertionError(f"still asking after {most} rounds")

    def sensor(self, table: str) -> str:
        """The name of a table's sensor."""
        return names.sensor_name(next(f.spec for f in self.files if f.spec.table == table))


def checks_of(result: dg.ExecuteInProcessResult) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """(column, check) → what the check said in a run."""
    return {
        (found.asset_key.path[-1], found.check_name): found
        for found in result.get_asset_check_evaluations()
    }
