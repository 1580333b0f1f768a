"""`embedding-pipeline dev`: Dagster's own `dagster dev` on the project's instance."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click

from embedding_pipeline.components.sensor import SENSORS_VARIABLE
from embedding_pipeline.definitions import CONSOLE_VARIABLE
from embedding_pipeline.main_job import prepare, use_project_instance
from embedding_pipeline.settings import PROJECT_ROOT, load_settings
from embedding_pipeline.spec_files import load_table_files


def serve(host: str, port: int, sensors: bool) -> int:
    """Prepare the database, start webserver, daemon and code server, wait for Ctrl-C."""
    files = load_table_files()
    use_project_instance()
    prepare(files, None, click.echo)
    settings = load_settings()
    click.echo(f"Dagster UI   http://{host}:{port}")
    database = "DATABASE_URL" if settings.database_url else "embedded Postgres"
    click.echo(f"database     {database}  (embedding-pipeline database-url prints it)")
    click.echo(f"tables       {', '.join(file.spec.table for file in files)}")
    click.echo(f"sensors      {'on' if sensors else 'off'}")
    click.echo("Ctrl-C stops everything.")
    environment = {
        **os.environ,
        SENSORS_VARIABLE: "on" if sensors else "off",
        CONSOLE_VARIABLE: os.environ.get(CONSOLE_VARIABLE, "WARNING"),
    }
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [
            *(sys.executable, "-m", "dagster", "dev"),
            *("--workspace", str(PROJECT_ROOT / "workspace.yaml")),
            *("--host", host, "--port", str(port), "--log-level", "warning"),
        ],
        env=environment,
        cwd=_working_folder(),
        start_new_session=True,
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return 0


def _working_folder() -> Path:
    return PROJECT_ROOT
