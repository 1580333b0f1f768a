"""`embedding-pipeline dev`: Dagster's own `dagster dev` on the project's instance."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import click
import dagster as dg
import psutil  # type: ignore[import-untyped]
import psycopg

from embedding_pipeline.components import names
from embedding_pipeline.components.sensor import SENSORS_VARIABLE
from embedding_pipeline.components.table_metadata import COUNTED_ROWS
from embedding_pipeline.dev_log import LogView
from embedding_pipeline.dev_summary import summary
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.main_job import prepare, use_project_instance
from embedding_pipeline.settings import PROJECT_ROOT, load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.spec_files import all_table_files
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.pending import (
    count_by_partition,
    estimated_rows,
    partitions_in_data,
)

STOP_SECONDS = 30.0
"""How long runs and servers have to end after Ctrl-C; then they are killed."""

QUIET = "ignore:Function `,ignore:Class `,ignore:Parameter `,ignore:Property `"
"""PYTHONWARNINGS: how Dagster's own preview and beta warnings begin; the webserver and every run
would repeat them."""


def serve(host: str, port: int, sensors: bool) -> int:
    """Prepare the database, start webserver, daemon and code server, wait for Ctrl-C."""
    files = all_table_files()
    _refuse_used_port(host, port)
    instance = use_project_instance()
    refused = prepare(files, None, click.echo)
    if refused:
        click.echo(f"not ready, and left alone until mended:\n{refused}", err=True)
    tables = [file.spec for file in files]
    make_partitions_known(instance, tables)
    address = f"http://{host}:{port}"
    for line in summary(tables, load_settings(), address, sensors):
        click.echo(line)
    click.echo("Ctrl-C stops everything.")
    # the code lies here also where it is not installed
    path = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    ignored = [os.environ.get("PYTHONWARNINGS", ""), QUIET]
    environment = {
        **os.environ,
        SENSORS_VARIABLE: "on" if sensors else "off",
        "DAGSTER_UI_URL": os.environ.get("DAGSTER_UI_URL") or address,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONWARNINGS": ",".join(filter(None, ignored)),
    }
    with _stopped_by_signals() as stopping:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [
                *(sys.executable, "-m", "dagster", "dev"),
                *("--workspace", str(PROJECT_ROOT / "workspace.yaml")),
                *("--host", host, "--port", str(port)),
                *("--log-level", "warning", "--code-server-log-level", "warning"),
            ],
            env=environment,
            cwd=instance.root_directory,  # a dagster.yaml in another folder would be a warning
            start_new_session=True,  # Ctrl-C reaches it through us, once
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=_follow, args=(process,), name="log", daemon=True).start()
        try:
            while process.poll() is None and not stopping:
                time.sleep(0.2)
        finally:
            stopped = bool(stopping)
            _stop(process)
    # the embedded servers outlive us by some seconds, on purpose
    warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
    return 0 if stopped else process.returncode or 1


def make_partitions_known(instance: dg.DagsterInstance, tables: Sequence[TableSpec]) -> None:
    """Let the UI list every partition at once, before any sensor has looked.

    Of a large table only those with pending rows: looking for all would read the whole table.
    """
    with connect() as connection:
        for table in tables:
            try:
                columns = bind_columns(connection, table)
                keys = {key for each in columns for key in count_by_partition(connection, each)}
                if estimated_rows(connection, columns[0]) <= COUNTED_ROWS:
                    keys |= partitions_in_data(connection, columns[0]).keys()
            except (PipelineError, psycopg.Error):
                continue  # it was said that the table is not ready; its sensor says it again
            names.add_partitions(instance, table, sorted(keys))


def _follow(process: "subprocess.Popen[bytes]") -> None:
    """Show what Dagster's processes say, until the last of them is gone."""
    assert process.stdout is not None
    view = LogView()
    for line in process.stdout:
        # never ends early: a full pipe would stop them
        with suppress(OSError, ValueError):
            words = view.line(line.decode(errors="replace"))
            if words is not None:
                click.echo(words)


def _refuse_used_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PipelineError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
            ) from None


@contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """The signals that asked us to stop, as they come in."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End `dagster dev` and every process that it started, runs included."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    left = [child for child in family if not _is_ours_to_keep(child)]
    for child in left:
        _signal(child, signal.SIGTERM)
    _, left = psutil.wait_procs(left, timeout=5)
    for child in left:
        _signal(child, signal.SIGKILL)


def _is_ours_to_keep(process: "psutil.Process") -> bool:
    """The embedded servers end by themselves, some seconds after their last user."""
    try:
        return any("embedding_pipeline.local." in part for part in process.cmdline()) or (
            process.name() == "postgres"
        )
    except psutil.Error:
        return True


def _signal(process: "psutil.Process", number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
