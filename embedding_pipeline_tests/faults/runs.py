"""Runs of the real core against a fault server: in this process, and in ones that can be killed."""

import json
import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psycopg

from embedding_pipeline.backfill import BackfillError, Options, Outcome
from embedding_pipeline.embed_column import ColumnRun, embed_column
from embedding_pipeline.embedders import endpoints, engine
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import lease as lease_module
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.partitions import key_from_database
from embedding_pipeline.store.pending import count_by_partition
from embedding_pipeline_tests.faults.server import FaultServer

KEY_VARIABLE = "FAULT_PROVIDER_KEY"
KEY = "the.providers.KEY-0123456789abcdef"
"""Of no known shape, so that only the code that knows it can keep it out of sight."""
PASSWORD = "the-databases-PASSWORD"

BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.01, 0.1
"""In place of the engine's: half a second and 30."""


def provider(server: FaultServer, dialect: str = "openai", **changes: Any) -> dict[str, Any]:
    """An entry of `providers.yaml` for a fault server."""
    return {
        "dialect": dialect,
        "address": server.tei_url if dialect == "tei" else server.openai_url,
        "api_key_env": KEY_VARIABLE,
        "concurrency": 8,
        "timeout_seconds": 20.0,
        "give_up_after_seconds": 30.0,
    } | changes


@dataclass
class Pipeline:
    """One test's database, provider file and everything that was shown to anybody."""

    url: str
    providers_file: Path
    shown: list[str] = field(default_factory=list)

    def declare(self, **providers: Mapping[str, Any]) -> None:
        """Write the provider file (JSON is YAML)."""
        self.providers_file.write_text(json.dumps({"providers": providers}))

    def column(self, table: TableSpec) -> Column:
        """The migrated table's first embedding column."""
        with connect(self.url) as connection:
            migrate(connection, [table])
            return bind_columns(connection, table)[0]

    def run(self, column: Column, **options: Any) -> ColumnRun:
        """`embed_column` on every partition of the column that has pending rows."""
        try:
            run = embed_column(
                self.url,
                column,
                self.partitions(column),
                Options(**options),
                report=self.shown.append,
                on_progress=lambda progress: self.shown.append(str(progress)),
            )
        except PipelineError as error:
            self.shown += ["".join(traceback.format_exception(error)), repr(vars(error))]
            raise
        self.shown.append(repr(run))
        return run

    def failing_run(self, column: Column, **options: Any) -> tuple[str, Outcome]:
        """What a run says that has to stop, and what it had done by then."""
        try:
            run = self.run(column, **options)
        except BackfillError as error:
            return str(error), error.outcome
        raise AssertionError(f"the run did not fail: {run}")

    def partitions(self, column: Column) -> list[str]:
        """Every partition with pending rows, and one in any case."""
        with connect(self.url) as connection:
            return list(count_by_partition(connection, column)) or [
                key_from_database(column.table, None)
            ]

    def start(
        self, column: Column, *, heartbeat: float = 0.2, lapse: float = 1.0, **options: Any
    ) -> "RunProcess":
        """The same in a process of its own."""
        log = self.providers_file.with_name("processes.log")
        work = _Work(
            self.url,
            str(self.providers_file),
            column.table.model_dump_json(exclude_unset=True),
            self.partitions(column),
            options,
            str(log),
            heartbeat,
            lapse,
        )
        return RunProcess(work, self.shown)


@dataclass(frozen=True)
class _Work:
    url: str
    providers_file: str
    table: str
    partitions: list[str]
    options: dict[str, Any]
    log: str
    heartbeat: float
    lapse: float


@dataclass(frozen=True)
class Ended:
    """How a run in another process ended; `error` is the exception's name."""

    error: str | None
    said: str
    counts: dict[str, int]


class RunProcess:
    """A run in a process of its own, forked from one that has everything imported."""

    def __init__(self, work: _Work, shown: list[str]) -> None:
        self._shown = shown
        self._log = Path(work.log)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._here, there = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_in_process, args=(work, there))
        self.process.start()
        there.close()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> bool:
        """kill -9; False when it had ended by itself."""
        self.process.kill()
        self.process.join()
        self._collect_log()
        return self.process.exitcode == -9

    def result(self, seconds: float = 60.0) -> Ended:
        """How it ended; waits for it."""
        assert self._here.poll(seconds), "the run does not end"
        ended: Ended = self._here.recv()
        self.process.join()
        self._collect_log()
        self._shown.append(repr(ended))
        return ended

    def _collect_log(self) -> None:
        if self._log.exists():
            self._shown.append(self._log.read_text())


def _in_process(work: _Work, there: Pipe) -> None:
    logging.basicConfig(filename=work.log, level=logging.DEBUG)
    os.environ[KEY_VARIABLE] = KEY
    shorten_waiting(setattr)
    setattr(endpoints, "PROVIDERS_FILE", Path(work.providers_file))  # noqa: B010 - not final
    setattr(lease_module, "HEARTBEAT_SECONDS", work.heartbeat)  # noqa: B010
    setattr(lease_module, "LAPSE_SECONDS", work.lapse)  # noqa: B010
    table = TableSpec.model_validate_json(work.table)
    said: list[str] = []
    try:
        with connect(work.url) as connection:
            column = bind_columns(connection, table)[0]
        run = embed_column(
            work.url, column, work.partitions, Options(**work.options), report=said.append
        )
        ended = Ended(None, "\n".join([*said, repr(run)]), asdict(run.outcome.total))
    except (PipelineError, psycopg.Error) as error:
        said.append("".join(traceback.format_exception(error)))
        outcome = getattr(error, "outcome", None)
        counts = asdict(outcome.total) if outcome is not None else {}
        ended = Ended(type(error).__name__, "\n".join(said), counts)
    there.send(ended)


def shorten_waiting(assign: Callable[[Any, str, Any], object]) -> None:
    """Back-off in hundredths of a second; `assign` is `setattr` or a monkeypatch's."""
    assign(engine, "FIRST_BACKOFF_SECONDS", BACKOFF_SECONDS)
    assign(engine, "LONGEST_BACKOFF_SECONDS", LONGEST_BACKOFF_SECONDS)
