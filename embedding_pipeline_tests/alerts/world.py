"""One table with everything around it: provider, instance, sensors, an alert channel."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import psycopg
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    ScheduleInstigatorData,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._utils.error import SerializableErrorInfo

from embedding_pipeline.alerts.sensor import alert_sensor
from embedding_pipeline.alerts.tick import tick as look
from embedding_pipeline.components import names
from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.components.sensor import _tick
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.pending import count_by_partition
from embedding_pipeline_tests.alerts.receiver import Received, Receiver
from embedding_pipeline_tests.faults.server import FaultServer

CHECKS = ("coverage", "vectors_valid", "golden_mrr", "index_recall")


@dataclass
class World:
    """A complete column `docs.embedding_4` of sixty rows, unless a test breaks it."""

    file: TableFile
    column: Column
    url: str
    receiver: Receiver
    server: FaultServer
    instance: dg.DagsterInstance
    cursor: str | None = None
    extra: dg.Definitions = field(default_factory=dg.Definitions)

    def __post_init__(self) -> None:
        spec = self.file.spec
        self.key = names.column_key(spec, self.column.embedding)
        self.index = names.index_key(spec, self.column.embedding)
        self.quality = names.quality_key(spec)
        self.load()

    def load(self) -> None:
        """The definitions, as a code location loads them."""
        self.definitions = dg.Definitions.merge(
            table_definitions(self.file),
            dg.Definitions(
                sensors=[alert_sensor([self.file.spec])], executor=dg.in_process_executor
            ),
            self.extra,
        )

    @property
    def repository(self) -> dg.RepositoryDefinition:
        """As a code server has it."""
        return self.definitions.get_repository_def()

    # ---- what happens in it ------------------------------------------------------------------

    def tick(self, times: int = 1) -> list[Received]:
        """Evaluate the alert sensor; the messages that arrived meanwhile."""
        before = len(self.receiver.messages)
        for _ in range(times):
            done = look(
                self.instance,
                [self.file.spec],
                self.repository,
                cursor=self.cursor,
            )
            self.cursor = done.cursor
            self.said, self.failed = done.words, done.failed
        return self.receiver.messages[before:]

    def run(
        self,
        *assets: dg.AssetKey,
        checks: tuple[str, ...] = (),
        partitions: tuple[str, str] | None = None,
    ) -> dg.ExecuteInProcessResult:
        """A real run of these assets and checks; it may fail."""
        job = self.definitions.get_implicit_global_asset_job_def()
        subset = job.get_subset(
            asset_selection=set(assets),
            asset_check_selection={dg.AssetCheckKey(self.key, name) for name in checks},
        )
        return subset.execute_in_process(
            instance=self.instance,
            tags={
                **(names.range_tags(*partitions) if partitions else {}),
                names.TABLE_TAG: self.file.spec.asset_name,
                names.COLUMN_TAG: self.column.embedding.column,
            },
            raise_on_error=False,
        )

    def embed(self) -> dg.ExecuteInProcessResult:
        """Materialise every partition."""
        names.add_partitions(self.instance, self.file.spec, sorted(self.pending()))
        order = names.known_partitions(self.instance, self.file.spec)
        return self.run(self.key, partitions=(order[0], order[-1]))

    def evaluate(self) -> dg.ExecuteInProcessResult:
        """Index, golden set and every check, as the nightly run does it."""
        return self.run(self.index, self.quality, checks=CHECKS)

    def check(self, *checks: str) -> dg.ExecuteInProcessResult:
        """Thorough checks by themselves."""
        return self.run(checks=checks or CHECKS)

    def table_sensor(self) -> Any:
        """One tick of the table's own sensor; it frees what dead runs hold."""
        return _tick(self.instance, self.file.spec)

    def sql(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Execute something in the source tables' database."""
        with connect(self.url) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def pending(self) -> dict[str, int]:
        with connect(self.url) as connection:
            return count_by_partition(connection, self.column)

    def back_off_is_over(self) -> None:
        """As if the time until the next attempt had passed: for leases and for messages."""
        self.sql("UPDATE embedding_pipeline.lease SET not_before = NULL")
        self.sql("UPDATE embedding_pipeline.alert_message SET not_before = now()")

    def instigate(
        self,
        name: str,
        status: str,
        ticks: int,
        *,
        seconds_ago: float = 0.0,
        running: bool = True,
    ) -> None:
        """Note what the daemon would note of a sensor or schedule: its state, and some ticks."""
        is_schedule = name in {each.name for each in self.definitions.schedules or ()}
        kind = InstigatorType.SCHEDULE if is_schedule else InstigatorType.SENSOR
        target = LoadableTargetOrigin(module_name="embedding_pipeline.definitions")
        location = ManagedGrpcPythonEnvCodeLocationOrigin(target, "embedding_pipeline")
        origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), name)
        at = time.time() - seconds_ago
        began = at - 86_400
        state = InstigatorState(
            origin,
            kind,
            InstigatorStatus.RUNNING if running else InstigatorStatus.STOPPED,
            ScheduleInstigatorData("0 0 * * *", began) if is_schedule else SensorInstigatorData(),
        )
        known = self.instance.get_instigator_state(origin.get_id(), state.selector_id)
        if known is None:
            self.instance.add_instigator_state(state)
        else:
            self.instance.update_instigator_state(known.with_status(state.status))
        said = SerializableErrorInfo("scripted failure", [], "Failure")
        for _ in range(ticks):
            self.instance.create_tick(
                TickData(
                    origin.get_id(),
                    name,
                    kind,
                    TickStatus[status],
                    at,
                    error=said if status == "FAILURE" else None,
                    selector_id=state.selector_id,
                    end_timestamp=at,
                )
            )

    # ---- what is known -----------------------------------------------------------------------

    def incidents(self) -> list[tuple[Any, ...]]:
        """(kind, subject, told, over) of every incident, oldest first."""
        return self.sql(
            "SELECT kind, subject, notified_at IS NOT NULL, recovered_at IS NOT NULL"
            " FROM embedding_pipeline.incident ORDER BY id"
        )


def eventually(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for what other threads or processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


Connection = psycopg.Connection[Any]
