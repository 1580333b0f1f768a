"""`embedding-pipeline dev`: Dagster's own `dagster dev` on the project's instance."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import click
import psutil  # type: ignore[import-untyped]

from embedding_pipeline.components.sensor import SENSORS_VARIABLE
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.main_job import prepare, use_project_instance
from embedding_pipeline.settings import PROJECT_ROOT, load_settings
from embedding_pipeline.spec_files import all_table_files

STOP_SECONDS = 30.0
"""How long runs and servers have to end after Ctrl-C; then they are killed."""

QUIET = "ignore:Function `,ignore:Class `,ignore:Parameter `,ignore:Property `"
"""PYTHONWARNINGS: how Dagster's own preview and beta warnings begin; the webserver and every run
would repeat them."""


def serve(host: str, port: int, sensors: bool) -> int:
    """Prepare the database, start webserver, daemon and code server, wait for Ctrl-C."""
    files = all_table_files()
    _refuse_used_port(host, port)
    home = use_project_instance().root_directory
    refused = prepare(files, None, click.echo)
    if refused:
        click.echo(f"not ready, and left alone until mended:\n{refused}", err=True)
    settings = load_settings()
    database = (
        "DATABASE_URL"
        if settings.database_url
        else f"embedded Postgres in {settings.embedding_pipeline_home}"
    )
    click.echo(f"Dagster UI   http://{host}:{port}")
    click.echo(f"database     {database}  (embedding-pipeline database-url prints its address)")
    click.echo(f"tables       {', '.join(file.spec.table for file in files)}")
    click.echo(f"sensors      {'on' if sensors else 'off'}")
    click.echo("Ctrl-C stops everything.")
    # the code lies here also where it is not installed
    path = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    warnings = [os.environ.get("PYTHONWARNINGS", ""), QUIET]
    environment = {
        **os.environ,
        SENSORS_VARIABLE: "on" if sensors else "off",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONWARNINGS": ",".join(filter(None, warnings)),
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
            cwd=home,  # a dagster.yaml in another folder would be a warning
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
        try:
            while process.poll() is None and not stopping:
                time.sleep(0.2)
        finally:
            stopped = bool(stopping)
            _stop(process)
    return 0 if stopped else process.returncode or 1


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
