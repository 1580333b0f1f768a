"""The embedded Postgres starts after anything that can happen to it, once, and loses nothing."""

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local import in_use, postgres
from embedding_pipeline.local.postgres import ensure_postgres, is_running, postgres_url
from embedding_pipeline_tests.local.processes import (
    PACKAGE_ROOT,
    POSTGRES_USER,
    eventually,
    is_alive,
    mentioning,
    users,
)


def query(url: str, statement: str) -> Any:
    """The first row."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchone() if cursor.description else None


def postmaster_pid(home: Path) -> int:
    return int((home / "postgres" / "data" / "postmaster.pid").read_text().split("\n", 1)[0])


def keeper_pid(home: Path) -> int:
    return int((home / "postgres" / "keeper.pid").read_text())


def _removed(folder: Path) -> bool:
    """Remove what a living server may be writing to; whether nothing is left."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid), f"{pid} ends")


@pytest.fixture
def shared_url(shared_home: Path) -> str:
    """A running server for tests that only look at it."""
    return ensure_postgres(shared_home)


@pytest.fixture
def url(home: Path) -> str:
    """A running server with one table and one committed row."""
    url = ensure_postgres(home, linger=0.2)
    query(url, "CREATE TABLE kept AS SELECT 1 AS number")
    return url


def assert_nothing_is_lost(home: Path) -> None:
    url = ensure_postgres(home, linger=0.2)
    assert query(url, "SELECT count(*) FROM kept") == (1,)
    query(url, "UPDATE kept SET number = number")


def test_it_is_postgres_18_with_pgvector_and_two_databases(
    shared_home: Path, shared_url: str
) -> None:
    assert query(shared_url, "SELECT current_setting('server_version_num')::int / 10000") == (18,)
    query(shared_url, "CREATE EXTENSION vector")
    assert query(shared_url, "SELECT '[1,2]'::vector <=> '[1,2]'") == (0.0,)
    assert query(shared_url, "SELECT current_database(), current_user") == (
        "embedding_pipeline",
        "postgres",
    )
    dagster = postgres_url(shared_home, database="dagster")
    assert query(dagster, "SELECT current_database()") == ("dagster",)


def test_it_is_crash_safe_and_alike_on_each_machine(shared_url: str) -> None:
    for setting, value in {
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "data_checksums": "on",
        "server_encoding": "UTF8",
        "shared_buffers": "256MB",
        "max_connections": "200",
        "listen_addresses": "",
        "TimeZone": "UTC",
    }.items():
        assert query(shared_url, f"SELECT current_setting('{setting}')") == (value,), setting
    assert query(
        shared_url,
        "SELECT datlocprovider, datlocale FROM pg_database WHERE datname = 'embedding_pipeline'",
    ) == ("b", "C.UTF-8")
    assert query(shared_url, "SELECT lower('ÑANDÚ'), 'Ñ' ILIKE 'ñ'") == ("ñandú", True)


def test_full_text_search_splits_spanish_punctuation_from_words(shared_url: str) -> None:
    # Under the C library's plain C locale "¿Qué" is one word, and is never found.
    words = query(shared_url, "SELECT to_tsvector('simple', '¿Qué tal? —mañana— «árbol»')::text")
    assert words == ("'mañana':3 'qué':1 'tal':2 'árbol':4",)


def test_psycopg2_and_sqlalchemy_take_the_url(shared_home: Path, shared_url: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgres_url(shared_home, database="dagster"))
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT 1")).scalar() == 1
    engine.dispose()


def test_processes_starting_at_once_on_an_empty_home_get_one_server(home: Path) -> None:
    with users(POSTGRES_USER, *[(home, 0.2)] * 5) as started:
        urls = {user.answer() for user in started}
        assert len(urls) == 1
        assert query(urls.pop(), "SELECT 1") == (1,)
        log = (home / "postgres" / "log").read_text()
        assert log.count("database system is ready to accept connections") == 1


def test_it_ends_after_its_last_user_was_killed_and_shuts_down_in_order(home: Path) -> None:
    with users(POSTGRES_USER, [home, 0.2], [home, 0.2]) as (one, two):
        assert one.answer() == two.answer()
        server = postmaster_pid(home)
        one.end()
        two.kill()
        eventually(lambda: not is_alive(server), "the server ends")
    assert "database system is shut down" in (home / "postgres" / "log").read_text()
    assert not is_running(home)


def test_after_kill_9_of_the_keeper_a_new_one_adopts_the_server(home: Path, url: str) -> None:
    server, keeper = postmaster_pid(home), keeper_pid(home)
    with psycopg.connect(url) as held:
        kill(keeper)
        assert_nothing_is_lost(home)
        assert postmaster_pid(home) == server
        assert held.execute("SELECT 1").fetchone() == (1,)  # nobody's connection was cut
    eventually(lambda: keeper_pid(home) != keeper, "a new keeper comes")
    in_use.release(home / "postgres")
    eventually(lambda: not is_alive(server), "the new keeper ends the server in time")


def test_after_kill_9_of_the_postmaster_the_keeper_starts_it_again(home: Path, url: str) -> None:
    server = postmaster_pid(home)
    kill(server)
    assert_nothing_is_lost(home)
    assert postmaster_pid(home) != server


def test_after_kill_9_of_everything_it_starts_again(home: Path, url: str) -> None:
    kill(keeper_pid(home))
    for process in mentioning(str(home / "postgres" / "data")):
        process.kill()
    assert_nothing_is_lost(home)


def test_a_backend_that_outlives_its_postmaster_does_not_stand_in_the_way(
    home: Path, url: str
) -> None:
    """One that computes does not notice, and Postgres refuses to start beside it:
    "pre-existing shared memory block is still in use". What it had not committed is undone.
    """
    connection = psycopg.connect(url)
    connection.execute("INSERT INTO kept SELECT generate_series(1, 100000)")
    backend = connection.info.backend_pid
    busy = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {backend} AND query LIKE 'DO %'"
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(connection.execute, b"DO 'BEGIN LOOP NULL; END LOOP; END'")
        eventually(lambda: query(url, busy) == (1,), "it computes")
        kill(keeper_pid(home))
        kill(postmaster_pid(home))
        assert is_alive(backend)
        assert_nothing_is_lost(home)
        assert not is_alive(backend)
        with pytest.raises(psycopg.OperationalError):
            computing.result(30)
    connection.close()


def test_a_restarted_machine_that_gave_the_pid_to_another_process_is_no_obstacle(
    home: Path, url: str
) -> None:
    """Postgres alone refuses: "lock file postmaster.pid already exists"."""
    postgres.stop_postgres(home)
    data = home / "postgres" / "data"
    account = data.stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "1000"], user=account) as innocent:
        try:
            lines = [str(innocent.pid), str(data), str(int(time.time())), "5432", str(data), ""]
            (data / "postmaster.pid").write_text("\n".join([*lines, "  12345  0", "ready   ", ""]))
            (data / ".s.PGSQL.5432.lock").write_text("\n".join([*lines, ""]))
            for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                shutil.chown(data / name, data.stat().st_uid)
            assert_nothing_is_lost(home)
            assert innocent.poll() is None
        finally:
            innocent.kill()


def test_a_removed_home_takes_its_server_with_it_and_a_new_one_starts(home: Path, url: str) -> None:
    first, keeper = postmaster_pid(home), keeper_pid(home)
    eventually(lambda: _removed(home / "postgres"), "the home is removed")
    fresh = ensure_postgres(home, linger=0.2)
    assert query(fresh, "SELECT to_regclass('kept')") == (None,)
    eventually(lambda: not is_alive(first), "the old server ends")
    eventually(lambda: not is_alive(keeper), "the old keeper ends")
    assert query(fresh, "SELECT 1") == (1,)


def test_a_killed_initdb_leaves_nothing_that_looks_complete(home: Path) -> None:
    unfinished = home / "postgres" / "data.unfinished"
    (unfinished / "base").mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    assert query(ensure_postgres(home), "SELECT 1") == (1,)
    assert not unfinished.exists()


def test_two_homes_have_two_servers(home: Path) -> None:
    one, two = home / "one", home / "two"
    try:
        urls = [ensure_postgres(one), ensure_postgres(two)]
        query(urls[0], "CREATE TABLE only_here ()")
        assert query(urls[1], "SELECT to_regclass('only_here')") == (None,)
        postgres.stop_postgres(one)
        assert not is_running(one)
        assert query(urls[1], "SELECT 1") == (1,)
    finally:
        for each in (one, two):
            in_use.release(each / "postgres")
            postgres.stop_postgres(each)


@pytest.mark.parametrize("name", ["long " * 30, "with %20 & ? # ü characters"])
def test_any_path_will_do(home: Path, name: str) -> None:
    """A unix socket's path holds 107 bytes, and the URL must survive what paths may hold."""
    odd = home / name.strip()
    try:
        url = ensure_postgres(odd, linger=0.2)
        assert query(url, "SELECT 1") == (1,)
        assert urlsplit(url).scheme == "postgresql"
        kill(postmaster_pid(odd))
        assert query(ensure_postgres(odd), "SELECT 1") == (1,)
    finally:
        in_use.release(odd / "postgres")
        postgres.stop_postgres(odd)


def test_a_server_that_cannot_start_shows_the_end_of_its_log(home: Path, url: str) -> None:
    postgres.stop_postgres(home)
    (home / "postgres" / "data" / "global" / "pg_control").write_bytes(b"damaged")
    with pytest.raises(PipelineError, match="the embedded Postgres could not start") as caught:
        ensure_postgres(home)
    assert "pg_control" in str(caught.value)
    assert str(home / "postgres" / "log") in str(caught.value)


def test_a_missing_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "find_spec", lambda _: None)
    with pytest.raises(PipelineError, match=r"make install.*DATABASE_URL"):
        postgres._binaries()


def test_stopping_and_looking_start_nothing(home: Path) -> None:
    assert not is_running(home)
    postgres.stop_postgres(home)
    assert not is_running(home)
    assert not mentioning(str(home))


def test_nobody_else_may_connect(shared_home: Path, shared_url: str) -> None:
    """Authentication is trust, so the folder must be closed."""
    data = shared_home / "postgres" / "data"
    assert stat.S_IMODE(data.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests already run as an ordinary user")
def test_an_ordinary_user_runs_the_server_as_itself() -> None:
    account = pwd.getpwnam("nobody")
    code = (
        "import sys; from pathlib import Path; from embedding_pipeline.local import postgres; "
        "import psycopg; home = Path(sys.argv[1]); "
        "url = postgres.ensure_postgres(home); "
        "print(psycopg.connect(url).execute('SELECT 1').fetchone()); "
        "print((home / 'postgres' / 'data').owner()); "
        "postgres.stop_postgres(home)"
    )
    home = Path(tempfile.mkdtemp(prefix="embedding_pipeline_test_"))
    try:
        os.chown(home, account.pw_uid, account.pw_gid)
        result = subprocess.run(
            [interpreter_for(account.pw_name), "-c", code, str(home)],
            cwd="/",
            env={
                "PATH": os.defpath,
                "PYTHONPATH": os.pathsep.join([str(PACKAGE_ROOT), *filter(None, sys.path)]),
            },
            user=account.pw_name,
            group=account.pw_gid,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split("\n")[:2] == ["(1,)", account.pw_name]
    finally:
        shutil.rmtree(home)


def interpreter_for(user: str) -> str:
    """Our Python where `user` may execute it (root's own installations often are closed)."""
    for candidate in (
        sys.executable,
        shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin"),
    ):
        if candidate is not None:
            try:
                subprocess.run([candidate, "-c", ""], cwd="/", user=user, check=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            return candidate
    pytest.skip(f"{user} may not execute {sys.executable}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another account")
def test_root_below_a_closed_folder_opens_it_for_passing_through_only(home: Path) -> None:
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    inner = closed / "home"
    try:
        assert query(ensure_postgres(inner), "SELECT 1") == (1,)
        assert stat.S_IMODE(closed.stat().st_mode) == 0o701
    finally:
        in_use.release(inner / "postgres")
        postgres.stop_postgres(inner)


def test_a_client_that_only_knows_the_address_keeps_the_server_up(home: Path) -> None:
    """`psql "$(embedding-pipeline database-url)"`: the command that started the server has ended
    and the server went away under the open session."""
    url = ensure_postgres(home, linger=0.2)
    with psycopg.connect(url, autocommit=True) as client:
        in_use.release(home / "postgres")
        lingered = time.monotonic() + 2
        while time.monotonic() < lingered:  # ten lingers: it would have stopped by now
            assert client.execute("SELECT 1").fetchone() == (1,)
    eventually(lambda: not is_running(home), "the server stops after its last client")


def test_the_server_waits_for_a_client_that_was_promised_it(home: Path) -> None:
    """A script gets the address first and connects when it comes to it."""
    url = ensure_postgres(home, linger=0.2)
    postgres.keep_up(home, 3600)
    in_use.release(home / "postgres")
    lingered = time.monotonic() + 2
    while time.monotonic() < lingered:
        assert query(url, "SELECT 1") == (1,)
    (home / "postgres" / "stay_until").unlink()
    eventually(lambda: not is_running(home), "the server stops when the promise is over")
