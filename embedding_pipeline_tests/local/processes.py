"""Real processes for tests: users that can be killed, and waiting with a deadline."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

PACKAGE_ROOT = Path(__file__).resolve().parents[2]

POSTGRES_USER = """
import sys
from pathlib import Path
from embedding_pipeline.local.postgres import ensure_postgres
print(ensure_postgres(Path(sys.argv[1]), linger=float(sys.argv[2])), flush=True)
sys.stdin.read()
"""
MODEL_SERVER_USER = """
import sys
from pathlib import Path
from embedding_pipeline.local.model_server import ensure_model_server
print(ensure_model_server(Path(sys.argv[1]), linger=float(sys.argv[2])), flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses a service until it is told to end, or killed."""

    def __init__(self, code: str, *arguments: object, **popen: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **popen,
        )

    def answer(self) -> str:
        """The URL that it got; waits for it."""
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline().strip()
        assert line, f"the user ended with {self.process.wait()} instead of getting a server"
        return line

    def end(self) -> None:
        """Let it come to its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def users(code: str, *argument_lists: Sequence[object], **popen: Any) -> Iterator[list[User]]:
    """Several users at once, killed at the end."""
    started = [User(code, *arguments, **popen) for arguments in argument_lists]
    try:
        yield started
    finally:
        for user in started:
            user.kill()
            for stream in (user.process.stdin, user.process.stdout):
                assert stream is not None
                stream.close()


def eventually(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait until `condition()` holds; the test fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def mentioning(text: str) -> list[psutil.Process]:
    """Living processes with `text` in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if text in " ".join(process.cmdline()) and is_alive(process.pid):
                found.append(process)
    return found
