"""The user's own SQL files: applied once, in order, and remembered by name and content."""

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import ddl, project_schema, sqlfiles
from embedding_pipeline.store.ddl import Report, Statement, quiet

Connection = psycopg.Connection[Any]


def plan_files(connection: Connection, files: Sequence[Path]) -> list[Statement]:
    """What `apply_files` would execute: each file with its record, in one transaction.

    SchemaError when a file cannot be read, or was applied before with other content.
    """
    known: dict[str, str] = {}
    if project_schema.version(connection):
        known = dict(
            connection.execute(
                b"SELECT name, sha256 FROM embedding_pipeline.applied_file"
            ).fetchall()
        )
    steps: list[Statement] = []
    for file in files:
        text = _read(file)
        _refuse_transactions(file, text)
        digest = sha256(text.encode()).hexdigest()
        before = known.get(file.name)
        if before == digest:
            continue
        if before is not None:
            raise SchemaError(
                f"{file}: a file named {file.name} was applied before, and its content has changed "
                "since. Put it back as it was and write the change as a new file with a new name"
            )
        known[file.name] = digest
        record = sqlfiles.compose(
            "project/record_file", name=sql.Literal(file.name), sha256=sql.Literal(digest)
        ).as_string(connection)
        # the file may end in a comment, so what follows starts on a line of its own
        steps.append(
            Statement(
                f"{text.rstrip()}\n;\n{record}",
                f"apply {file}",
                table=str(file),
                lock_timeout_ms=None,
            )
        )
    return steps


def apply_files(
    connection: Connection, files: Sequence[Path], *, report: Report = quiet
) -> list[str]:
    """Apply the user's own SQL files in the given order; returns the names of those applied now.

    Each runs in one transaction together with its record (name and SHA-256); one that was
    applied before is skipped. A file that has changed since it was applied is a SchemaError
    before anything is executed.
    """
    plan_files(connection, files)
    with ddl.turn(connection, 0, "the project's own schema", report=report):
        for step in project_schema.plan_project(connection):
            ddl.execute(connection, step, report=report)
        steps = plan_files(connection, files)
        waiting = {step.table: step for step in steps}
        applied = []
        for file in files:
            if str(file) not in waiting:
                report(f"{file.name}: applied before")
                continue
            _apply(connection, file, waiting.pop(str(file)))
            report(f"{file.name}: applied")
            applied.append(file.name)
    return applied


def _apply(connection: Connection, file: Path, step: Statement) -> None:
    try:
        with connection.transaction():
            before = _transaction(connection)
            connection.execute(step.sql.encode())
            if _transaction(connection) != before:
                raise SchemaError(
                    f"{file}: it ended the transaction that it was to run in; parts of it may "
                    "have been applied. Leave BEGIN, COMMIT and ROLLBACK out of it"
                )
    except psycopg.DatabaseError as error:
        where = ""
        if error.diag.statement_position:
            line = step.sql[: int(error.diag.statement_position) - 1].count("\n") + 1
            where = f", line {line}"
        hint = ""
        if isinstance(error, psycopg.errors.ActiveSqlTransaction):
            hint = (
                ". A file runs in one transaction; execute such a statement by hand "
                '(psql "$(embedding-pipeline database-url)")'
            )
        raise SchemaError(
            f"{file}{where}: {ddl.primary(error)}{hint}. Nothing of this file was applied"
        ) from None


_QUOTED = re.compile(
    r"--[^\n]*|/\*.*?\*/|\bE'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
    r"|\$(\w*)\$.*?\$\1\$",
    re.DOTALL | re.IGNORECASE,
)
_CONTROL = re.compile(r"(begin(?!\s+atomic)|start\s+transaction|commit|rollback|abort)\b", re.I)


def _refuse_transactions(file: Path, text: str) -> None:
    for statement in _QUOTED.sub(lambda match: "\n" * match[0].count("\n"), text).split(";"):
        if control := _CONTROL.match(statement.strip()):
            raise SchemaError(
                f"{file}: it contains {control[1].upper()}. Each file runs in one transaction, "
                "together with the record that it was applied; leave that out"
            )


def _transaction(connection: Connection) -> Any:
    row = connection.execute(b"SELECT pg_current_xact_id()::text").fetchone()
    return row[0] if row else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{file}: cannot be read as UTF-8 text: {error}") from None
