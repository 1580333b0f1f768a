"""Plain `dagster` in a clone, with no variable set."""

import subprocess
import sys
from pathlib import Path

import pytest

from embedding_pipeline.local.model_server import stop_model_server
from embedding_pipeline.local.postgres import is_running, stop_postgres
from embedding_pipeline_tests.e2e.project import (
    Project,
    answers,
    clean_environment,
    clone,
    free_port,
    wait_until,
)


@pytest.mark.slow
def test_dagster_dev_and_validate_work_in_a_plain_clone(folder: Path) -> None:
    clone(folder)
    environment = clean_environment() | {"PYTHONPATH": str(folder)}
    validated = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert validated.returncode == 0, validated.stderr
    assert "All code locations passed validation" in validated.stdout + validated.stderr

    clone_project = Project(folder, environment, "", "", root=folder)
    port, log = free_port(), folder / "dev.log"
    try:
        process = clone_project.start(
            "dagster", "dev", "-w", "workspace.yaml", "--port", str(port), log=log
        )
        wait_until(
            lambda: answers(f"http://127.0.0.1:{port}/server_info") or process.poll() is not None,
            120,
            log.read_text,
        )
        assert process.poll() is None, log.read_text()
        # its storage is that of the command line: the embedded server under .local
        assert is_running(folder / ".local")
    finally:
        clone_project.close()
        stop_model_server(folder / ".local")
        stop_postgres(folder / ".local")
