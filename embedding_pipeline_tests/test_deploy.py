"""deploy/: what can be known of it without a container engine."""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterInstance
from dagster._core.instance.ref import InstanceRef
from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator

from embedding_pipeline.settings import PROJECT_ROOT, Settings
from embedding_pipeline_tests.project import fresh_settings, use_database

DEPLOY = PROJECT_ROOT / "deploy"
PINNED = re.compile(r"[^:@\s]+(/[^:@\s]+)*:(?!latest)[\w.-]*\d[\w.-]*")


def read(name: str) -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(document, dict)
    return document


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions as (name, argument), continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", dockerfile).splitlines()
    found = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    return [(name, argument) for name, argument in found]


COMPOSE = read("compose.yaml")
VALUES = read("helm/values.yaml")
DOCKERFILE = instructions((DEPLOY / "Dockerfile").read_text())


class TestCompose:
    def test_it_is_what_the_specification_allows(self) -> None:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
        checked = subprocess.run(
            [*command, "vendor.compose-spec", DEPLOY / "compose.yaml"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr

    def test_all_parts_are_there(self) -> None:
        assert set(COMPOSE["services"]) == {
            *("postgres", "tei", "setup", "code", "webserver", "daemon"),
        }

    @pytest.mark.parametrize("name", COMPOSE["services"])
    def test_every_image_has_a_version(self, name: str) -> None:
        assert PINNED.fullmatch(COMPOSE["services"][name]["image"])

    @pytest.mark.parametrize("name", sorted(set(COMPOSE["services"]) - {"setup"}))
    def test_what_keeps_running_is_looked_after(self, name: str) -> None:
        service = COMPOSE["services"][name]
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")

    def test_each_waits_for_what_it_needs(self) -> None:
        needs = {
            name: {other: how["condition"] for other, how in service["depends_on"].items()}
            for name, service in COMPOSE["services"].items()
            if "depends_on" in service
        }
        assert needs == {
            "setup": {"postgres": "service_healthy", "tei": "service_healthy"},
            "code": {"setup": "service_completed_successfully"},
            "webserver": {"code": "service_healthy"},
            "daemon": {"code": "service_healthy"},
        }

    def test_no_secret_stands_in_the_file(self) -> None:
        for service in COMPOSE["services"].values():
            for name, value in service.get("environment", {}).items():
                if re.search("PASSWORD|KEY|ALERT_URLS|DATABASE_URL", name):
                    assert "${" in value, name
        # without a password nothing starts, and the message says where it belongs
        assert COMPOSE["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"] == (
            "${POSTGRES_PASSWORD:?set POSTGRES_PASSWORD in deploy/.env}"
        )

    def test_every_variable_is_one_that_something_reads(self) -> None:
        known = {name.upper() for name in Settings.model_fields} | {"EMBEDDING_PIPELINE_SENSORS"}
        assert set(COMPOSE["services"]["code"]["environment"]) <= known
        asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
        offered = set(re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
        assert asked == offered

    def test_nothing_listens_beyond_this_machine(self) -> None:
        ports = [port for each in COMPOSE["services"].values() for port in each.get("ports", [])]
        assert ports == ["127.0.0.1:3000:3000"]

    def test_every_volume_is_declared(self) -> None:
        used = {
            volume.split(":")[0]
            for service in COMPOSE["services"].values()
            for volume in service.get("volumes", [])
        }
        assert used == set(COMPOSE["volumes"])


class TestDockerfile:
    def test_every_base_has_a_version(self) -> None:
        (argument,) = (rest for name, rest in DOCKERFILE if name == "ARG" and "PYTHON=" in rest)
        version = argument.removeprefix("PYTHON=")
        for name, rest in DOCKERFILE:
            if name == "FROM":
                assert PINNED.fullmatch(rest.split()[0].replace("${PYTHON}", version))

    def test_its_python_is_one_that_the_project_supports(self) -> None:
        (argument,) = (rest for name, rest in DOCKERFILE if name == "ARG" and "PYTHON=" in rest)
        major, minor = argument.removeprefix("PYTHON=").split(".")[:2]
        assert (int(major), int(minor)) >= (3, 11)

    def test_what_it_copies_exists_and_is_sent_to_the_builder(self) -> None:
        ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        assert ignore[1] == "*", "nothing is sent but what is named"
        sent = [line[1:] for line in ignore if line.startswith("!")]
        copied = [
            source
            for name, rest in DOCKERFILE
            if name == "COPY" and "--from" not in rest
            for source in rest.split()[:-1]
        ]
        assert "embedding_pipeline" in copied
        for source in copied:
            assert (PROJECT_ROOT / source).exists(), source
            assert source in sent, source
        assert set(sent) == set(copied)

    def test_no_file_with_secrets_is_sent_to_the_builder(self) -> None:
        sent = [
            line[1:]
            for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
            if line.startswith("!")
        ]
        for name in (".env", "deploy/.env", ".local", ".git"):
            assert not any(fnmatch.fnmatch(name, pattern) for pattern in sent), name

    def test_it_does_not_run_as_root(self) -> None:
        names = [name for name, _ in DOCKERFILE]
        assert names.index("USER") > len(names) - 1 - names[::-1].index("FROM")
        assert ("USER", "dagster") in DOCKERFILE

    def test_only_known_instructions(self) -> None:
        assert {name for name, _ in DOCKERFILE} <= {
            *("ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"),
        }

    def test_shell_lines_are_well_formed(self) -> None:
        for name, rest in DOCKERFILE:
            if name == "RUN":
                checked = subprocess.run(["sh", "-n", "-c", rest], check=False, timeout=20)
                assert checked.returncode == 0, rest

    def test_its_command_is_the_code_location(self) -> None:
        (command,) = (yaml.safe_load(rest) for name, rest in DOCKERFILE if name == "CMD")
        assert command == COMPOSE["services"]["code"]["command"]

    def test_the_image_is_of_this_version(self) -> None:
        project = (PROJECT_ROOT / "pyproject.toml").read_text()
        (version,) = re.findall(r'^version = "(.+)"', project, re.MULTILINE)
        assert COMPOSE["services"]["code"]["image"] == f"embedding-pipeline:{version}"
        for each in images(VALUES):
            assert each["tag"] == version


def images(value: Any) -> list[dict[str, str]]:
    """Every `image:` in Helm values."""
    if isinstance(value, list):
        return [image for item in value for image in images(item)]
    if not isinstance(value, dict):
        return []
    own = [value["image"]] if "image" in value else []
    return own + [image for item in value.values() for image in images(item)]


def most_runs(instance: DagsterInstance) -> int:
    queue = instance.get_concurrency_config().run_queue_config
    assert queue is not None
    return queue.max_concurrent_runs


@pytest.fixture(params=["dagster.yaml", "deploy/dagster.yaml"])
def instance_file(request: pytest.FixtureRequest) -> Path:
    return PROJECT_ROOT / str(request.param)


class TestInstances:
    """Both dagster.yaml are loaded by Dagster itself, which refuses keys that it does not know."""

    def test_dagster_takes_it(
        self,
        instance_file: Path,
        database: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        use_database(monkeypatch, database)
        (tmp_path / "dagster.yaml").write_text(instance_file.read_text())
        with fresh_settings(), DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as one:
            assert one.is_persistent
            assert type(one.run_storage).__name__ != "SqliteRunStorage"
            assert one.run_monitoring_enabled
            assert one.run_monitoring_max_runtime_seconds == 21600
            assert one.global_op_concurrency_default_limit == 4
            assert one.get_settings("retention")
            # a slow table's tick, or a run whose process takes long to start, holds up no other
            assert one.get_sensor_settings()["use_threads"]
            queue = one.run_coordinator
            assert isinstance(queue, QueuedRunCoordinator)
            assert queue.dequeue_use_threads
            assert queue.dequeue_interval_seconds == 1
            assert most_runs(one) >= 4
            assert not one.telemetry_enabled

    def test_a_key_that_dagster_does_not_know_would_be_refused(self, tmp_path: Path) -> None:
        text = (DEPLOY / "dagster.yaml").read_text()
        assert "  start_timeout_seconds:" in text
        wrong = text.replace("  start_timeout_seconds:", "  start_timeout:")
        (tmp_path / "dagster.yaml").write_text(wrong)
        with pytest.raises(Exception, match="start_timeout"):
            InstanceRef.from_dir(str(tmp_path))


class TestHelm:
    def test_the_instance_that_the_chart_would_write_is_one_that_dagster_takes(
        self, tmp_path: Path
    ) -> None:
        """As the chart's template puts it together from these values (chart 1.13)."""
        retention = VALUES["retention"]
        assert VALUES["dagsterDaemon"]["runCoordinator"] == {"enabled": False}
        assert VALUES["dagsterDaemon"]["runMonitoring"] == {"enabled": False}
        instance = {
            "retention": {
                kind: {"purge_after_days": retention[kind]["purgeAfterDays"]}
                for kind in ("sensor", "schedule")
            },
            "python_logs": {"python_log_level": VALUES["pythonLogs"]["pythonLogLevel"]},
            **VALUES["additionalInstanceConfig"],
        }
        (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(instance))
        with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as one:
            assert one.run_monitoring_max_runtime_seconds == 21600
            assert most_runs(one) == 10
            assert type(one.run_coordinator).__name__ == "QueuedRunCoordinator"

    def test_it_limits_the_same_as_compose(self) -> None:
        compose = read("dagster.yaml")
        for name in ("concurrency", "run_queue", "run_monitoring"):
            assert VALUES["additionalInstanceConfig"][name] == compose[name]

    def test_no_secret_stands_in_the_values(self) -> None:
        text = "\n".join(
            line
            for line in (DEPLOY / "helm" / "values.yaml").read_text().splitlines()
            if not line.lstrip().startswith("#")
        )
        assert not re.search(r"(?i)password:|api_key|postgresql://", text)
        assert VALUES["generatePostgresqlPasswordSecret"] is False

    def test_every_image_has_a_version(self) -> None:
        found = images(VALUES)
        assert len(found) == 3
        for image in found:
            assert PINNED.fullmatch(f"{image['repository']}:{image['tag']}")

    def test_the_code_location_is_the_one_of_compose(self) -> None:
        (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
        command = COMPOSE["services"]["code"]["command"]
        assert " ".join(deployment["dagsterApiGrpcArgs"]) in " ".join(command)
        assert str(deployment["port"]) in command

    def test_no_port_asks_for_root(self) -> None:
        webserver = VALUES["dagsterWebserver"]
        assert webserver["service"]["port"] >= 1024
        assert webserver["readinessProbe"]["httpGet"]["port"] == webserver["service"]["port"]

    def test_the_versions_in_its_comments_are_those_of_the_lock(self) -> None:
        text = (DEPLOY / "helm" / "values.yaml").read_text()
        lock = (PROJECT_ROOT / "requirements.lock").read_text()
        (dagster,) = re.findall(r"^dagster==(\S+)", lock, re.MULTILINE)
        (library,) = re.findall(r"^dagster-postgres==(\S+)", lock, re.MULTILINE)
        assert f"--version {dagster}" in text
        # dagster's libraries are released together
        assert f"dagster-k8s=={library}" in text
        assert f"dagster-k8s=={library}" in (DEPLOY / "Dockerfile").read_text()


def test_the_readme_names_what_it_explains() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in sorted(DEPLOY.rglob("*")):
        if path.is_file() and path.name != "README.md":
            assert path.name in text, path.name
