"""A project of its own in a temporary folder, driven from outside as a user does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import psutil  # type: ignore[import-untyped]

from embedding_pipeline.local.model_server import ensure_model_server, stop_model_server
from embedding_pipeline.local.postgres import postgres_url, stop_postgres
from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline.store.connection import connect

Value = TypeVar("Value")

SETTINGS = re.compile(
    r"EMBEDDING_|OPENAI_|DAGSTER_|DATABASE_URL|POSTGRES_URL|USE_|SIMILARITY_|ALERT_|NIGHTLY_"
)
"""Variables that a test must not inherit from the machine it runs on."""


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", json.loads(self.out))

    def closing_table(self) -> dict[str, list[str]]:
        """`table.column` → the other cells of the table that `run` ends with."""
        rows = [
            [cell.strip() for cell in line.strip("│ \n").split("│")]
            for line in self.out.splitlines()
            if line.startswith("│")
        ]
        return {row[0]: row[1:] for row in rows}


@dataclass
class Project:
    """One project: home with the embedded servers, Dagster home, environment."""

    folder: Path
    environment: dict[str, str]
    url: str
    """Of the database with the source tables."""
    dagster_url: str
    dagster_schema: str = "public"
    root: Path = PROJECT_ROOT
    """The clone whose code runs."""
    _processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    # ---- commands ----------------------------------------------------------------------------

    def run(self, *arguments: str, **environment: str) -> Done:
        """Run `embedding-pipeline …` to its end."""
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "embedding_pipeline", *arguments],
            env={**self.environment, **environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def start(self, *arguments: str, log: Path | None = None) -> "subprocess.Popen[bytes]":
        """Start `python -m …`, output into a file; `close` ends it at the latest."""
        path = log or self.folder / f"{len(self._processes)}.log"
        with path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self.environment,
                cwd=self.root,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def dev(self, *, log: Path, sensors: bool = True) -> tuple["subprocess.Popen[bytes]", str]:
        """A running `dev` and its address; returns when the UI answers."""
        port = free_port()
        process = self.start(
            *("embedding_pipeline", "dev", "--port", str(port)),
            *(() if sensors else ("--no-sensors",)),
            log=log,
        )
        address = f"http://127.0.0.1:{port}"
        wait_until(
            lambda: answers(f"{address}/server_info") or process.poll() is not None,
            90,
            lambda: log.read_text(),
        )
        assert process.poll() is None, log.read_text()
        return process, address

    def close(self) -> None:
        """End every process that this project started, and all that those started."""
        for process in self._processes:
            family = descendants(process.pid) if process.poll() is None else []
            for member in family:
                kill(member.pid)
            kill(process.pid)
            process.wait(timeout=30)

    # ---- facts -------------------------------------------------------------------------------

    def sql(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Rows of a statement in the source tables' database."""
        with connect(self.url) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def dagster(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Rows of a statement in Dagster's own tables."""
        with connect(self.dagster_url) as connection:
            connection.execute(f'SET search_path = "{self.dagster_schema}"')
            return connection.execute(query, parameters).fetchall()

    def stats(self) -> dict[str, int]:
        """What the model server has embedded since its start: requests, inputs, tokens."""
        with urllib.request.urlopen(f"{ensure_model_server(self.home)}/stats") as answer:
            return cast("dict[str, int]", json.load(answer)["total"])

    def coverage(self, table: str) -> dict[str, dict[str, Any]]:
        """`status --json` of a table, by column."""
        done = self.run("status", "--table", table, "--json")
        assert done.code == 0, done.err
        return {row["column"]: row for row in done.json}

    def pending(self, table: str, column: str) -> int:
        """Rows whose fingerprint is not that of their text; plain SQL over the stored recipe."""
        [(expected,)] = self.sql(
            "SELECT expected_expression FROM embedding_pipeline.embedding_column"
            " WHERE table_name = $1 AND column_name = $2",
            table,
            column,
        )
        [(count,)] = self.sql(
            f'SELECT count(*) FROM "{table}" WHERE "{column}_fingerprint"'
            f' IS DISTINCT FROM ({expected}) OR ("{column}" IS NULL) <> (({expected}) IS NULL)'
        )
        return int(count)

    def runs(self) -> dict[str, str]:
        """Dagster's runs and their status, oldest first."""
        return dict(self.dagster("SELECT run_id, status FROM runs ORDER BY id"))


def make_project(folder: Path) -> Project:
    """An empty project: nothing is started yet but the embedded Postgres, when it is asked for."""
    dagster_home = folder / "dagster"
    dagster_home.mkdir(parents=True)
    shutil.copy(PROJECT_ROOT / "dagster.yaml", dagster_home)
    environment = clean_environment() | {
        "EMBEDDING_PIPELINE_HOME": str(folder / "home"),
        "DAGSTER_HOME": str(dagster_home),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    home = folder / "home"
    return Project(
        folder,
        environment,
        postgres_url(home, database="embedding_pipeline"),
        postgres_url(home, database="dagster"),
    )


def on_another_database(project: Project, folder: Path, name: str) -> Project:
    """A project on a database of the same server, given as DATABASE_URL is by a user."""
    with connect(project.url) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    url = urlunsplit(urlsplit(project.url)._replace(path=f"/{name}"))
    dagster_home = folder / "dagster"
    dagster_home.mkdir(parents=True)
    shutil.copy(PROJECT_ROOT / "dagster.yaml", dagster_home)
    environment = project.environment | {"DAGSTER_HOME": str(dagster_home), "DATABASE_URL": url}
    return Project(folder, environment, url, url, "dagster")


def clone(root: Path) -> None:
    """The project's files as a fresh clone has them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".local")
    for name in ("embedding_pipeline", "sql"):
        shutil.copytree(PROJECT_ROOT / name, root / name, ignore=ignored)
    for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml"):
        shutil.copy(PROJECT_ROOT / name, root)


def clean_environment() -> dict[str, str]:
    """This process's environment without any of the project's settings."""
    return {name: value for name, value in os.environ.items() if not SETTINGS.match(name)}


def temporary_folder() -> Path:
    """Outside pytest's own, whose path is too long for a socket."""
    return Path(tempfile.mkdtemp(prefix="e2e-"))


def discard(project: Project) -> None:
    """Stop everything of a project and remove its folder."""
    project.close()
    stop_model_server(project.home)
    stop_postgres(project.home)
    shutil.rmtree(project.folder, ignore_errors=True)


# ---- YAML ------------------------------------------------------------------------------------


def write_table(
    folder: Path,
    table: str,
    *,
    text: str,
    embeddings: Sequence[Mapping[str, object]],
    golden: Sequence[Mapping[str, object]] = (),
    **attributes: object,
) -> Path:
    """`<folder>/<table>/defs.yaml` and its golden set; returns the YAML's path."""
    place = folder / table
    place.mkdir(parents=True, exist_ok=True)
    spec: dict[str, object] = {"table": table, "text": text, "embeddings": list(embeddings)}
    spec |= attributes
    if golden:
        lines = [json.dumps(query, ensure_ascii=False) for query in golden]
        (place / "golden_set.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec["golden_set"] = "golden_set.jsonl"
    path = place / "defs.yaml"
    document = {"type": "embedding_pipeline.EmbeddedTable", "attributes": spec}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


MINILM = {
    "column": "embedding_384",
    "dimensions": 384,
    "provider": "tei",
    "model": "sentence-transformers/all-MiniLM-L6-v2",
}
LAYERS = {
    "column": "embedding_1536",
    "dimensions": 1536,
    "provider": "local",
    "model": "all-minilm-l6-v2-layers",
}


# ---- waiting and processes -------------------------------------------------------------------


def wait_until(
    condition: Callable[[], Value], seconds: float, why: Callable[[], object] = lambda: ""
) -> Value:
    """The condition's first true value; AssertionError with `why()` when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {why()}"
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> "list[psutil.Process]":
    """The processes below one, embedded servers (which end by themselves) left out."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if not _is_server(process)]


def still_at_work(processes: "list[psutil.Process]") -> "list[psutil.Process]":
    """Those that have not ended; one that only waits for its parent to notice has."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _is_server(process: "psutil.Process") -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "embedding_pipeline.local." in command or "postgres" in command


def kill(pid: int) -> None:
    """`kill -9`."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
