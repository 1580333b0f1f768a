"""The smallest service that `in_use` can keep: a socket that echoes, and only one at a time.

Run as a keeper's module by test_in_use. The keeper notes it in the file `violation` when it
finds another instance still serving on the same directory.
"""

import argparse
import contextlib
import os
import socket
import time
from pathlib import Path

from embedding_pipeline.local import in_use


def directory_of(home: Path) -> Path:
    """Where the service keeps its files."""
    return home / "fake"


def ensure(home: Path, *, linger: float = 0.05, broken: bool = False) -> str:
    """The service's socket path, like the real services' `ensure_…`."""
    directory = directory_of(home)

    def ready() -> str | None:
        return str(directory / "socket") if echoes(directory) else None

    return in_use.ensure(
        directory,
        __name__,
        [str(home), "--linger", str(linger), *(["--broken"] if broken else [])],
        ready,
        what="the fake service",
        log=directory / "log",
        stale=[directory / "socket"],
    )


def echoes(directory: Path) -> bool:
    """Whether a living server answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(directory / "socket"))
            client.sendall(b"?")
            return client.recv(1) == b"!"
        except OSError:
            return False


def main() -> None:
    """Serve until nobody uses it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--linger", type=float)
    parser.add_argument("--keeper-lock", type=int)
    parser.add_argument("--broken", action="store_true")
    options = parser.parse_args()
    directory = directory_of(options.home)
    keeping = in_use.Keeping(directory, options.keeper_lock, options.linger)
    if options.broken:
        raise SystemExit("the fake service is broken on purpose")
    only = in_use.try_lock(directory / "serving")
    if only is None:
        (directory / "violation").write_text(f"{os.getpid()} found another one serving")
        raise SystemExit(1)
    (directory / "pid").write_text(str(os.getpid()))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "socket"))
        server.listen(64)
        server.settimeout(keeping.pause)
        while not keeping.is_over():
            _answer_one(server)
        # Stopping takes a while, as it does for a database, and a server that is stopping may
        # still answer: whoever comes now must not take it for one that will stay.
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            _answer_one(server)
    os.close(only)
    keeping.end()


def _answer_one(server: socket.socket) -> None:
    with contextlib.suppress(TimeoutError):
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            if client.recv(1):
                client.sendall(b"!")


if __name__ == "__main__":
    main()
