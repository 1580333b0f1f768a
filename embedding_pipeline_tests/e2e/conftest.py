"""One home for the whole session, made by the very first `embedding-pipeline run`."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embedding_pipeline_tests.e2e.project import Done, Project, discard, make_project
from embedding_pipeline_tests.e2e.project import temporary_folder as make_folder


@dataclass(frozen=True)
class FirstRun:
    """The project after `run` from nothing, what that run said, and what Dagster knew then."""

    project: Project
    done: Done
    runs: dict[str, str]
    checks: list[tuple[Any, ...]]
    """(asset key as JSON, check, status)"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real processes on a busy machine take their time. A file's tests stay in one worker, and so
    do all files whose tests share the first run's home."""
    mine = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    sharing = {item.path for item in mine if "first_run" in getattr(item, "fixturenames", ())}
    for item in mine:
        group = "first_run" if item.path in sharing else item.path.stem
        item.add_marker(pytest.mark.timeout(600))
        item.add_marker(pytest.mark.xdist_group(f"e2e-{group}"))


@pytest.fixture(scope="session")
def first_run() -> Iterator[FirstRun]:
    """`embedding-pipeline run` in an empty home: no server, no database, no variable set."""
    project = make_project(make_folder())
    try:
        done = project.run("run")
        checks = "SELECT asset_key, check_name, execution_status FROM asset_check_executions"
        yield FirstRun(project, done, project.runs(), project.dagster(checks))
    finally:
        discard(project)


@pytest.fixture(scope="session")
def project(first_run: FirstRun) -> Project:
    """The project with the four sample tables complete. A test changes only tables of its own."""
    assert first_run.done.code == 0, first_run.done.out + first_run.done.err
    return first_run.project


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path."""
    path = make_folder()
    yield path
    shutil.rmtree(path, ignore_errors=True)
