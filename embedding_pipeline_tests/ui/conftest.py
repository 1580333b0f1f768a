"""One `embedding-pipeline dev` on a home of its own, and a browser in front of it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from embedding_pipeline.settings import PROJECT_ROOT

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_SECONDS = 180

# what is awaited comes when it comes: a busy machine is no failure
expect.set_options(timeout=60_000)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests share one running project."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group("ui"))
            item.add_marker(pytest.mark.timeout(600))


@dataclass(frozen=True)
class Project:
    """A running project: its UI's address, and the environment to run commands in."""

    address: str
    environment: dict[str, str]
    pictures: Path

    def run(self, *arguments: str) -> str:
        """What `embedding-pipeline …` prints; the test fails when the command does."""
        done = subprocess.run(
            [sys.executable, "-m", "embedding_pipeline", *arguments],
            env=self.environment,
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout


def _chromium() -> str:
    given = os.environ.get("CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = given or next((path for name in names if (path := shutil.which(name))), None)
    if found is not None:
        return found
    message = "no Chromium found: install it (Debian: apt-get install chromium) or set CHROMIUM"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium of the system; skipped without one, except in CI."""
    path = _chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def project(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """`dev` on an empty home with the sensors off: the sample tables, nothing embedded yet."""
    home = tmp_path_factory.mktemp("project")
    shutil.copy(PROJECT_ROOT / "dagster.yaml", home / "dagster.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EMBEDDING_", "OPENAI_", "DATABASE_", "DAGSTER_", "POSTGRES_"))
    }
    environment = {
        **inherited,
        "EMBEDDING_PIPELINE_HOME": str(home / "local"),
        "DAGSTER_HOME": str(home),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    log = home / "dev.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "embedding_pipeline", "dev"),
                *("--port", str(port), "--no-sensors"),
            ],
            env=environment,
            cwd=PROJECT_ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    pictures = PROJECT_ROOT / "test-artifacts"
    pictures.mkdir(exist_ok=True)
    try:
        _await_ui(address, process, log)
        yield Project(address, environment, pictures)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _await_ui(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/server_info", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"the UI did not come up:\n{log.read_text()[-3000:]}")


@pytest.fixture
def page(browser: Browser, project: Project, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of 1280 × 800; a picture of how it ended lies in test-artifacts/."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, base_url=project.address)
    page.set_default_timeout(60_000)
    yield page
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    page.screenshot(path=project.pictures / f"{name}.png")
    page.close()
