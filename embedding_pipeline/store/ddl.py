"""Executing schema changes on a live table without standing in anybody's way.

Two kinds of statement exist. One that needs an exclusive lock runs in a transaction of its own
with `lock_timeout = 200ms`: everybody who comes after it in the table's lock queue waits for it,
so it gives up quickly, lets them pass and tries again. One that runs CONCURRENTLY blocks nobody
while it waits, so it waits as long as it takes and says for whom.

What holds behind a transaction pooler: `SET LOCAL` inside the transactions, and the lock of
`turn`, which belongs to a transaction too. CONCURRENTLY cannot run in a transaction, so the
settings for it (`session_settings`) are the session's and may not reach it there; they only make
it slower, or let a `statement_timeout` of the role cancel it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.connection import DatabaseUnreachableError, connect

Connection = psycopg.Connection[Any]
Report = Callable[[str], None]

LOCK_TIMEOUT_MS = 200
"""The longest that a schema change may make others wait behind it."""

PATIENCE_SECONDS = 60.0
"""How long a schema change is tried again before the blocking session is reported as an error."""

_DEADLOCKS = 5
_TURN = 0x656D6264  # "embd": the class of our advisory locks


@dataclass(frozen=True)
class Statement:
    """One step of a migration, exactly as it is executed."""

    sql: str
    why: str
    concurrently: bool = False
    """Cannot run in a transaction; blocks neither readers nor writers."""
    table: str = ""
    """The source table that it concerns, for messages; empty for the project's own schema."""
    table_oid: int | None = None
    lock_timeout_ms: int | None = LOCK_TIMEOUT_MS
    """In a transaction: the longest wait for a lock; None where it waits as long as it takes."""
    undo: str | None = None
    """What removes the INVALID index that a failed CREATE INDEX CONCURRENTLY leaves behind."""
    advice: str = ""
    """What to do when Postgres refuses it."""


class BusyError(SchemaError):
    """Somebody else is building the very index that is wanted."""


class SharedMemoryError(SchemaError):
    """The server's shared memory is too small for a parallel index build."""


def quiet(message: str) -> None:
    """Report nothing."""


def render(statements: Sequence[Statement]) -> str:
    """The statements as a script for psql, in the very form in which they are executed."""
    if not statements:
        return "-- nothing to do\n"
    parts = ["\\set ON_ERROR_STOP on\n"]
    for step in statements:
        comment = "\n".join(f"-- {line}" for line in step.why.splitlines())
        if step.concurrently:
            parts.append(f"{comment}\n{step.sql};\n")
        else:
            settings = "".join(f"{setting};\n" for setting in _settings(step))
            parts.append(f"{comment}\nBEGIN;\n{settings}{step.sql};\nCOMMIT;\n")
    return "\n".join(parts)


def _settings(step: Statement) -> list[str]:
    """What a step's transaction starts with."""
    if step.lock_timeout_ms is None:
        return []
    # an autovacuum worker has to be told to make way before we give up
    sooner = sql.Literal(str(step.lock_timeout_ms // 2))
    return [
        f"SET LOCAL lock_timeout = {step.lock_timeout_ms}",
        sqlfiles.compose("deadlock_timeout", milliseconds=sooner).as_string(None),
    ]


def execute(
    connection: Connection,
    step: Statement,
    *,
    report: Report = quiet,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Execute one statement on a connection in autocommit mode.

    SchemaError when it cannot be, naming whoever stands in the way. DeadlockDetected is passed
    on: the caller looks at the catalogue again and goes on from there.
    """
    try:
        if step.concurrently:
            _execute_concurrently(connection, step, report)
        else:
            _execute_in_transaction(connection, step, report, patience)
    except errors.DeadlockDetected:
        raise
    except errors.InsufficientPrivilege as error:
        script = "the statements that `embedding-pipeline migrate --dry-run` prints"
        if len(step.sql) < 500:
            script = f"{step.sql};"
        raise SchemaError(
            f"{step.table or 'the project schema'}: not allowed to {step.why}: "
            f"{primary(error)}. Let the owner of the table (or of the database) run {script}"
        ) from None
    except errors.DependentObjectsStillExist as error:
        detail = (error.diag.message_detail or "").replace("\n", "; ")
        raise SchemaError(
            f"{step.table}: cannot {step.why}: {primary(error)} ({detail}). Drop those first, or "
            "use a new column"
        ) from None
    except psycopg.OperationalError as error:
        kind = SchemaError
        if isinstance(error, errors.DiskFull) and "shared memory" in primary(error):
            kind = SharedMemoryError
        raise kind(
            f"{step.table or 'the project schema'}: cannot {step.why}: {primary(error)}. "
            "Run this again: it goes on where it stopped"
        ) from None
    except psycopg.DatabaseError as error:
        raise SchemaError(
            f"{step.table or 'the project schema'}: cannot {step.why}: {primary(error)}"
            f"{f'. {step.advice}' if step.advice else ''}"
        ) from None


def carry_out(
    connection: Connection,
    subject: int,
    what: str,
    plan: Callable[[], Sequence[Statement]],
    *,
    report: Report = quiet,
    patience: float = PATIENCE_SECONDS,
) -> list[Statement]:
    """Execute what `plan` says, alone among our own schema changes of a table.

    `plan` is asked when it is our turn, since whoever had it before may have done it all, and
    again after a deadlock or while it raises BusyError, for up to `patience` seconds.
    Returns the statements that were executed.
    """
    if not connection.autocommit:
        raise ValueError("schema changes need a connection in autocommit mode")
    executed: list[Statement] = []
    with turn(connection, subject, what, report=report):
        deadlocks, started, told = 0, time.monotonic(), ""
        while True:
            try:
                steps = plan()
            except BusyError as error:
                if time.monotonic() - started > patience:
                    raise
                if str(error) != told:
                    report(told := str(error))
                time.sleep(0.5)
                continue
            try:
                for step in steps:
                    report(step.why)
                    execute(connection, step, report=report, patience=patience)
                    executed.append(step)
                return executed
            except errors.DeadlockDetected as error:
                deadlocks += 1
                report(f"{what}: {primary(error)}; looking again")
                if deadlocks == _DEADLOCKS:
                    raise SchemaError(
                        f"{what}: {primary(error)}, {deadlocks} times over; run this again when "
                        "no other schema change is under way"
                    ) from None


def patiently(
    connection: Connection,
    action: Callable[[], None],
    *,
    what: str,
    table_oid: int | None,
    report: Report = quiet,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Do something that runs under `lock_timeout`, again and again until it gets its lock.

    The pauses are longer than the timeout, so that a busy table is free most of the time.
    """
    started = time.monotonic()
    pause = 0.5
    while True:
        try:
            action()
            return
        except errors.LockNotAvailable as error:
            holders = lock_holders(connection, table_oid) if table_oid is not None else []
            blocked = "; ".join(holders) or primary(error)
            if time.monotonic() - started + pause > patience:
                raise SchemaError(
                    f"gave up after {patience:.0f} s of trying to {what}; in the way: {blocked}. "
                    "Let it end (or end it: SELECT pg_terminate_backend(<pid>)) and run this again"
                ) from None
            report(f"waiting to {what}: {blocked}")
        time.sleep(pause)
        pause = min(pause * 2, 5.0)


def lock_holders(connection: Connection, table_oid: int) -> list[str]:
    """Who holds a lock on a table, in words, oldest transaction first."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(sqlfiles.query("catalogue/lock_holders"), [table_oid]).fetchall()
    return [_session(row) for row in rows[:5]]


def _session(row: Mapping[str, Any]) -> str:
    if row["pid"] is None:
        return "a prepared transaction (see pg_prepared_xacts)"
    who = "/".join(filter(None, (row["usename"], row["application_name"])))
    age = f" for {row['seconds']:.0f} s" if row["seconds"] is not None else ""
    query = " ".join((row["query"] or "").split())[:200]
    return f"pid {row['pid']} ({who or 'unknown'}, {row['state'] or 'unknown'}{age}): {query}"


def _execute_in_transaction(
    connection: Connection, step: Statement, report: Report, patience: float
) -> None:
    def once() -> None:
        with connection.transaction():
            for setting in _settings(step):
                connection.execute(setting.encode())
            connection.execute(step.sql.encode())

    patiently(
        connection,
        once,
        what=step.why,
        table_oid=step.table_oid,
        report=report,
        patience=patience,
    )


def _execute_concurrently(connection: Connection, step: Statement, report: Report) -> None:
    with session_settings(connection, {"lock_timeout": "0", "statement_timeout": "0"}):
        try:
            _watch(connection, step, report)
        except psycopg.DatabaseError:
            # An invalid index is still maintained: one whose expression fails for some row would
            # make the user's own INSERT fail.
            if step.undo is not None and not connection.closed:
                with suppress(psycopg.DatabaseError):
                    connection.execute(step.undo.encode())
            raise


def _watch(connection: Connection, step: Statement, report: Report) -> None:
    """Run it in a thread; meanwhile say, from a second connection, how far it is and who waits."""
    # asked of the server: a pooler makes up the number that the protocol reports
    row = connection.execute(b"SELECT pg_backend_pid()").fetchone()
    assert row is not None
    pid: int = row[0]
    with ExitStack() as stack:
        try:
            watcher = stack.enter_context(sibling(connection))
        except DatabaseUnreachableError:
            watcher = None  # no connection to spare: the build goes on in silence
        pool = stack.enter_context(ThreadPoolExecutor(1, "ddl"))
        running = pool.submit(connection.execute, step.sql.encode())
        told = ""
        try:
            while True:
                try:
                    running.result(timeout=1.0)
                    return
                except NotYet:
                    message = progress(watcher, pid) if watcher else None
                    if message and message != told:
                        report(f"{step.why}: {message}")
                        told = message
        except BaseException:
            if not running.done():
                connection.cancel_safe(timeout=5.0)
            raise


def progress(watcher: Connection, pid: int) -> str | None:
    """What a session that builds, rebuilds or drops an index is doing, or for whom it waits."""
    try:
        with watcher.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(sqlfiles.query("catalogue/progress"), [pid]).fetchone()
    except psycopg.DatabaseError:
        return None  # whoever only watches must not end the work
    if row is None:
        return None
    if row["pid"] is not None:
        # without its age: the message is repeated only when it changes
        return "waiting for " + _session(row | {"seconds": None})
    if row["phase"] is None:
        return None
    done, total = row["done"], row["total"]
    return f"{row['phase']}, {100 * done / total:.0f} %" if total else str(row["phase"])


@contextmanager
def session_settings(connection: Connection, wanted: Mapping[str, str]) -> Iterator[None]:
    """Settings of the session, for statements that no transaction may enclose; put back after.

    Only those that differ are touched, so that nothing is left behind in a pooler's connection
    without need.
    """
    changed = []
    for name, value in wanted.items():
        row = connection.execute(
            "SELECT setting, current_setting(name) FROM pg_settings WHERE name = $1", [name]
        ).fetchone()
        if row is not None and value not in row:
            connection.execute("SELECT set_config($1, $2, false)", [name, value])
            changed.append((name, row[1]))
    try:
        yield
    finally:
        if not connection.closed:
            for name, value in changed:
                connection.execute("SELECT set_config($1, $2, false)", [name, value])


@contextmanager
def sibling(connection: Connection) -> Iterator[Connection]:
    """A second connection to the same database as the same role."""
    info = connection.info
    with connect(info.dsn, password=info.password) as second:
        yield second


@contextmanager
def turn(
    connection: Connection,
    subject: int,
    what: str,
    *,
    report: Report = quiet,
    patience: float = 3600.0,
) -> Iterator[None]:
    """One schema change at a time per table: two CONCURRENTLY builds on one table deadlock.

    `subject` is the table's oid (0 for the project's own schema). The lock belongs to a
    transaction of a second connection, so that it holds behind a transaction pooler too; it is
    asked for with `pg_try_…`, because whoever waited inside a statement would hold a snapshot
    that the other's CREATE INDEX CONCURRENTLY waits for in turn.
    """
    number = subject - (1 << 32) if subject >= 1 << 31 else subject
    with sibling(connection) as keeper, keeper.transaction():
        keeper.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        # Without bound parameters: an extended-protocol portal would keep its snapshot until the
        # transaction ends, and CREATE INDEX CONCURRENTLY would wait for it for ever.
        ask = sql.SQL("SELECT pg_try_advisory_xact_lock({}, {})").format(
            sql.Literal(_TURN), sql.Literal(number)
        )
        started = time.monotonic()
        told = False
        while True:
            row = keeper.execute(ask).fetchone()
            if row is not None and row[0]:
                break
            if time.monotonic() - started > patience:
                raise SchemaError(
                    f"gave up after {patience:.0f} s: another schema change of {what} does not end"
                )
            if not told:
                report(f"waiting for another schema change of {what} to end")
                told = True
            time.sleep(0.2)
        yield


def primary(error: psycopg.Error) -> str:
    """The message without its context lines."""
    return error.diag.message_primary or str(error).strip()
