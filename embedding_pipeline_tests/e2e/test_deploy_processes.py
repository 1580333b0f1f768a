"""compose.yaml without an engine: its very commands and health checks, as plain processes.

Only names and ports are others: a host of compose's network is this machine, and a fixed port is
a free one. Images, networks and volumes are not part of it.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedding_pipeline.local.samples import load_samples
from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.e2e.project import SETTINGS, free_port

pytestmark = pytest.mark.slow

DEPLOY = PROJECT_ROOT / "deploy"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())[
    "services"
]
PATIENCE_SECONDS = 240

LAUNCH = """
mutation Launch($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""


@dataclass
class Machine:
    """Where compose's services run as plain processes."""

    folder: Path
    environment: dict[str, str]
    ports: dict[str, str]
    """Compose's port → the one used here."""
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def here(self, command: list[str]) -> list[str]:
        """A command of compose.yaml with this machine's ports."""
        for theirs, ours in self.ports.items():
            command = [part.replace(f":{theirs}/", f":{ours}/") for part in command]
            command = [ours if part == theirs else part for part in command]
        return command

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self.here(SERVICES[name]["command"]),
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def healthy(self, name: str) -> bool:
        kind, *command = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.ends_well(command)

    def ends_well(self, command: list[str]) -> bool:
        done = subprocess.run(
            self.here(command),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        return done.returncode == 0

    def await_healthy(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.healthy(name):
            gone = self.processes[name].poll() is not None
            if gone or time.monotonic() > deadline:
                log = (self.folder / f"{name}.log").read_text()
                pytest.fail(f"{name} {'ended' if gone else 'did not become healthy'}:\n{log}")

    def ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports['3000']}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        assert "errors" not in answer, answer
        return dict(answer["data"])


@pytest.fixture
def machine(database: str, folder: Path) -> Iterator[Machine]:
    """DAGSTER_HOME and commands as in the image, with nothing started yet."""
    (folder / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
    ports = {port: str(free_port()) for port in ("3000", "4000")}
    workspace = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())
    (server,) = workspace["load_from"]
    assert server["grpc_server"]["host"] in SERVICES
    server["grpc_server"] |= {
        "host": "127.0.0.1",
        "port": int(ports[str(server["grpc_server"]["port"])]),
    }
    (folder / "workspace.yaml").write_text(yaml.safe_dump(workspace))
    # the image has the commands on its PATH
    commands = folder / "bin"
    commands.mkdir()
    ours = commands / "embedding-pipeline"
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m embedding_pipeline "$@"\n')
    ours.chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    inherited = {name: value for name, value in os.environ.items() if not SETTINGS.match(name)}
    path = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    machine = Machine(
        folder,
        {
            **inherited,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(PROJECT_ROOT),
            "DAGSTER_HOME": str(folder),
            "EMBEDDING_PIPELINE_HOME": str(folder / "local"),
            "DATABASE_URL": database,
            "EMBEDDING_PIPELINE_ENVIRONMENT": "production",
        },
        ports,
    )
    yield machine
    for process in machine.processes.values():
        process.terminate()
    for process in machine.processes.values():
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_the_services_come_up_healthy_and_a_run_goes_through_them(
    machine: Machine, database: str
) -> None:
    with connect(database) as connection:
        load_samples(connection, lambda _: None)
    setup = SERVICES["setup"]["command"]
    assert machine.ends_well(setup)
    assert machine.ends_well(setup), "it may be repeated, as `up` does"

    machine.start("code")
    machine.await_healthy("code")
    for name in ("webserver", "daemon"):
        machine.start(name)
    for name in ("webserver", "daemon"):
        machine.await_healthy(name)

    launched = machine.ask(
        LAUNCH,
        {
            "params": {
                "assetSelection": [{"path": ["lexicon", "embedding_384"]}],
                "partitionNames": ["0", "1", "2", "3"],
            }
        },
    )["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched
    backfill = {"id": launched["backfillId"]}
    question = (
        "query Q($id: String!) { r: partitionBackfillOrError(backfillId: $id)"
        " { ... on PartitionBackfill { status } } }"
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    status = "REQUESTED"
    while status in ("REQUESTED", "CANCELING") and time.monotonic() < deadline:
        status = machine.ask(question, backfill)["r"]["status"]
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-1500:] for path in machine.folder.glob("*.log"))
    assert status == "COMPLETED_SUCCESS", f"{status}\n{logs}"
    with connect(database) as connection:
        counted = connection.execute(
            "SELECT count(*), count(embedding_384), count(embedding_1536) FROM lexicon"
        ).fetchone()
        run = connection.execute("SELECT embedded, tokens > 0 FROM embedding_pipeline.run_result")
        assert run.fetchall() == [(225, True)]
        # Dagster's own tables lie beside the user's, in a schema of theirs
        runs = connection.execute("SELECT count(*) > 0 FROM dagster.runs").fetchone()
    assert counted == (225, 225, 0)
    assert runs == (True,)
    for name in machine.processes:
        assert machine.healthy(name), name


def test_a_health_check_fails_when_its_service_is_gone(machine: Machine) -> None:
    for name in ("code", "webserver", "daemon"):
        assert not machine.healthy(name), name
