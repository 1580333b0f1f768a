"""A local service lives exactly as long as some process uses it.

Three lock files in the service's directory, all taken with `flock`, which the kernel drops when
the last process holding the open file dies, `kill -9` included:

* `in_use.lock`: every user holds it shared for its whole life.
* `keeper.lock`: the one keeper process holds it exclusively for its whole life. The keeper owns
  the service: it starts it, restarts it, stops it.
* `start.lock`: held for the microseconds in which a user looks whether a keeper lives and, if
  none does, takes `keeper.lock` and hands the locked file on to a new keeper. As the lock
  changes hands by inheritance there is no moment in which two could start, and none in which a
  keeper that is still importing Python looks dead.

Why no user is left without a server. A keeper stops only after it got `in_use.lock`
*exclusively*, which it keeps until it is gone: a newcomer waits for its shared lock, then finds
`keeper.lock` free (it is released first) and starts afresh. Whoever already holds the shared
lock keeps the keeper from getting the exclusive one. A keeper that was killed holds neither
lock; the next user starts another, which adopts a service that outlived its keeper.

A removed directory (`make clean` under a running service) takes the lock files with it. Locks
on unlinked files mean nothing, so taking a lock checks that the path still leads to the locked
file, and a keeper whose lock file is gone stops.

`flock` is per open file, so a forked child shares its parent's hold, and so does not end it;
files are close-on-exec, so other programs do not prolong it.
"""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from embedding_pipeline.errors import PipelineError

Ready = TypeVar("Ready")

LINGER_SECONDS = 5.0
START_SECONDS = 600.0  # crash recovery of a large database takes minutes, and is not an error

_USERS, _KEEPER, _START = "in_use.lock", "keeper.lock", "start.lock"
_PROMISE = "stay_until"
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# What a keeper may see of the environment of the process that happened to start it: no secret.
_PASSED_ON = ("PATH", "HOME", "USER", "TMPDIR", "TZ", "VIRTUAL_ENV", "SYSTEMROOT", "LANG", "LC_ALL")

_held: dict[Path, int] = {}
_mutex = threading.Lock()


def _lock(path: Path, operation: int) -> int | None:
    """Lock the file at `path`; None when LOCK_NB was asked for and another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Lock the file at `path` exclusively; its descriptor, or None when another holds it."""
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def hold(directory: Path) -> None:
    """Count this process among the service's users until it ends (or calls `release`).

    Waits for a keeper that is just stopping the service. Raises PipelineError when the
    directory cannot be written to.
    """
    path = directory / _USERS
    with _mutex:
        descriptor = _held.get(path)
        if descriptor is not None and _is_at(descriptor, path):
            return
        if descriptor is not None:
            os.close(_held.pop(path))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held = _lock(path, fcntl.LOCK_SH)
        except OSError as error:
            raise PipelineError(
                f"cannot write to {directory}: {error.strerror}. The embedded servers keep their "
                f"files there; set EMBEDDING_PIPELINE_HOME to a folder that you may write to"
            ) from None
        assert held is not None
        _held[path] = held


def release(directory: Path) -> None:
    """Stop counting this process among the service's users."""
    with _mutex:
        descriptor = _held.pop(directory / _USERS, None)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _starting(directory: Path) -> Iterator[None]:
    descriptor = _lock(directory / _START, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def is_kept(directory: Path) -> bool:
    """Whether a keeper lives."""
    if not (directory / _KEEPER).exists():
        return False
    with _starting(directory):
        descriptor = try_lock(directory / _KEEPER)
        if descriptor is None:
            return True
        os.close(descriptor)
        return False


def _import_path() -> str:
    """This package and what the environment adds, but not the folder of the script that runs:
    a `click.py` beside it would be imported instead of the real one.
    """
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(_PACKAGE_ROOT), *(str(Path(e).absolute()) for e in added if e)])


class _KeeperGaveUpError(Exception):
    """The keeper that we started ended with an error."""


def _start_keeper(
    directory: Path,
    module: str,
    arguments: Sequence[str],
    log: Path,
    stale: Sequence[Path],
    previous: subprocess.Popen[bytes] | None,
) -> subprocess.Popen[bytes] | None:
    """Start `python -m module arguments --keeper-lock FD` unless a keeper lives (then None).

    The keeper is a session of its own, so that Ctrl-C in the user's terminal does not reach it.
    Raises _KeeperGaveUpError instead of starting another when `previous`, which we started
    before, ended with an error; one that was killed or asked to stop is replaced.
    """
    with _starting(directory):
        keeper_lock = try_lock(directory / _KEEPER)
        if keeper_lock is None:
            return None
        try:
            if previous is not None and previous.wait() > 0:
                raise _KeeperGaveUpError
            environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            environment["PYTHONPATH"] = _import_path()
            for path in stale:
                path.unlink(missing_ok=True)
            if log.exists():
                log.replace(log.with_name(f"{log.name}.1"))
            with log.open("wb") as output:
                return subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", module, *arguments, "--keeper-lock", str(keeper_lock)],
                    cwd="/",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[keeper_lock],
                    start_new_session=True,
                )
        finally:
            os.close(keeper_lock)


def ensure(
    directory: Path,
    module: str,
    arguments: Sequence[str],
    ready: Callable[[], Ready | None],
    *,
    what: str,
    log: Path,
    other_logs: Sequence[Path] = (),
    stale: Sequence[Path] = (),
    timeout: float = START_SECONDS,
) -> Ready:
    """Hold the service, see that a keeper lives, and wait until `ready()` answers.

    The keeper runs `python -m module arguments` and writes to `log`; the files in `stale` are
    what a dead one left, removed before another starts. Raises PipelineError with the last
    lines of the logs when the keeper that this call started gives up, or after `timeout` seconds.
    """
    hold(directory)
    deadline = time.monotonic() + timeout
    mine: subprocess.Popen[bytes] | None = None
    pause = 0.01
    while True:
        try:
            mine = _start_keeper(directory, module, arguments, log, stale, mine) or mine
        except _KeeperGaveUpError:
            logs = last_lines(log, *other_logs)
            raise PipelineError(f"{what} could not start:\n{logs}") from None
        answer = ready()
        if answer is not None:
            _remember(mine)
            return answer
        if time.monotonic() > deadline:
            _remember(mine)
            logs = last_lines(log, *other_logs)
            raise PipelineError(f"{what} did not become ready within {timeout:.0f} s:\n{logs}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


_children: list[subprocess.Popen[bytes]] = []


def _remember(child: subprocess.Popen[bytes] | None) -> None:
    """Keep the handle of a keeper that lives on: a collected one would warn, and reaps nothing."""
    _children[:] = [other for other in _children if other.poll() is None]
    if child is not None:
        _children.append(child)


def stay(directory: Path, seconds: float) -> None:
    """Promise that the service stays up for so long, for somebody who is still to come.

    A command that prints an address ends before whoever asked for it can connect.
    """
    until = time.time() + seconds
    if until > _promised(directory):
        (directory / _PROMISE).write_text(f"{until}\n")


def _promised(directory: Path) -> float:
    try:
        return float((directory / _PROMISE).read_text())
    except (OSError, ValueError):
        return 0.0


def last_lines(*logs: Path, count: int = 15) -> str:
    """The ends of some log files, for an error message."""
    parts = []
    for log in logs:
        try:
            lines = log.read_text(errors="replace").strip().splitlines()
        except OSError:
            continue
        if lines:
            parts.append("\n".join([f"--- the end of {log}", *lines[-count:]]))
    return "\n".join(parts) or "(it left no log)"


class Keeping:
    """The keeper's side: its own lock, and the question whether anybody still needs it."""

    def __init__(self, directory: Path, keeper_lock: int | None, linger: float | None) -> None:
        """Take over `keeper_lock` (inherited), or take the lock; `linger` None: stay for ever.

        Raises PipelineError when another keeper lives.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._linger = linger
        if keeper_lock is not None:
            os.set_inheritable(keeper_lock, False)
            self._keeper_lock = keeper_lock
        else:
            with _starting(directory):
                taken = try_lock(directory / _KEEPER)
            if taken is None:
                raise PipelineError(f"another process already keeps {directory}")
            self._keeper_lock = taken
        self._users_lock: int | None = None
        self._alone_since: float | None = None

    @property
    def pause(self) -> float:
        """Seconds to wait between two calls of `is_over`."""
        return 1.0 if self._linger is None else min(1.0, max(0.05, self._linger / 5))

    def is_over(self, busy: Callable[[], bool] = lambda: False) -> bool:
        """Whether to stop now: no user for `linger` seconds, or the directory is gone.

        `busy` is asked before the end: whether somebody uses the service who holds no lock, such
        as a `psql`. After True no user can come in until `end`.
        """
        if not _is_at(self._keeper_lock, self._directory / _KEEPER):
            return True
        if self._linger is None:
            return False
        try:
            users_lock = try_lock(self._directory / _USERS)
        except FileNotFoundError:
            return True
        if users_lock is None:
            self._alone_since = None
            return False
        now = time.monotonic()
        self._alone_since = now if self._alone_since is None else self._alone_since
        if now - self._alone_since < self._linger or time.time() < _promised(self._directory):
            os.close(users_lock)
            return False
        if busy():
            os.close(users_lock)
            self._alone_since = None
            return False
        self._users_lock = users_lock
        return True

    def end(self) -> None:
        """The service has stopped: let newcomers in, who will find no keeper."""
        os.close(self._keeper_lock)
        if self._users_lock is not None:
            os.close(self._users_lock)
