"""Bring the database to what the YAML says: columns, pending indexes, the project's own tables.

`prepare` looks at the catalogue and says what is missing; `migrate` executes exactly that and
looks again until nothing is missing. A database that is right is only read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors, sql

from embedding_pipeline.errors import IdentityError, PipelineError, SchemaError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import catalogue, ddl, project_schema, registry, sqlfiles
from embedding_pipeline.store.column import Column, TableFacts
from embedding_pipeline.store.ddl import Report, Statement, quiet, render
from embedding_pipeline.store.index_plan import (
    existing_indexes,
    plan_index,
    wanted_queues,
)

__all__ = ["Plan", "Statement", "migrate", "plan", "prepare", "render"]

Connection = psycopg.Connection[Any]

ATTEMPTS = 5
"""How often a table's plan is made anew after a deadlock or a failed build."""


@dataclass
class Plan:
    """What a migration would do, what it would leave undone, and what its user should know."""

    statements: list[Statement] = field(default_factory=list)
    problems: list[PipelineError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Plan") -> None:
        """Append another plan."""
        self.statements += other.statements
        self.problems += other.problems
        self.warnings += other.warnings


@dataclass(frozen=True)
class Choices:
    """What the user has decided about columns whose identity differs."""

    environment: str
    accept_reembed: bool = False
    take_ownership: bool = False
    cost: registry.Cost | None = None


def prepare(
    connection: Connection,
    tables: Sequence[TableSpec],
    *,
    environment: str | None = None,
    accept_reembed: bool = False,
    take_ownership: bool = False,
    cost: registry.Cost | None = None,
) -> Plan:
    """What `migrate` would do with the same arguments. Only reads."""
    choices = _choices(environment, accept_reembed, take_ownership, cost)
    whole = Plan()
    extension, vector_schema = project_schema.plan_extension(connection)
    whole.statements += extension + project_schema.plan_project(connection)
    for table in tables:
        whole.add(_prepare_table(connection, table, vector_schema, choices))
    return whole


def plan(connection: Connection, tables: Sequence[TableSpec], **choices: Any) -> list[Statement]:
    """The statements that `migrate` would execute; [] when there is nothing to do."""
    return prepare(connection, tables, **choices).statements


def migrate(
    connection: Connection,
    tables: Sequence[TableSpec],
    *,
    report: Report = quiet,
    environment: str | None = None,
    accept_reembed: bool = False,
    take_ownership: bool = False,
    cost: registry.Cost | None = None,
    patience: float = ddl.PATIENCE_SECONDS,
) -> list[Statement]:
    """Bring the database to what the YAML says; returns the statements that were executed.

    Safe to run again at any time, and to run again after it was interrupted anywhere. A table or
    column that cannot be brought there is left untouched, the others go on, and the error comes
    at the end. Raises IdentityError, SchemaError.
    """
    choices = _choices(environment, accept_reembed, take_ownership, cost)
    executed: list[Statement] = []

    def run(steps: Sequence[Statement]) -> None:
        for step in steps:
            report(step.why)
            ddl.execute(connection, step, report=report, patience=patience)
            executed.append(step)

    steps, _ = project_schema.plan_extension(connection)
    if steps or project_schema.plan_project(connection):
        with ddl.turn(connection, 0, "the project's own schema", report=report):
            run(project_schema.plan_extension(connection)[0])
            run(project_schema.plan_project(connection))
    problems: list[PipelineError] = []
    for table in tables:
        try:
            problems += _migrate_table(connection, table, choices, run, report)
        except PipelineError as error:
            problems.append(error)
    if problems:
        raise _together(problems)
    return executed


def _choices(
    environment: str | None,
    accept_reembed: bool,
    take_ownership: bool,
    cost: registry.Cost | None,
) -> Choices:
    return Choices(
        environment=environment or load_settings().embedding_pipeline_environment,
        accept_reembed=accept_reembed,
        take_ownership=take_ownership,
        cost=cost,
    )


def _migrate_table(
    connection: Connection,
    table: TableSpec,
    choices: Choices,
    run: Callable[[Sequence[Statement]], None],
    report: Report,
) -> list[PipelineError]:
    vector_schema = project_schema.vector_schema(connection)
    first = _prepare_table(connection, table, vector_schema, choices)
    for warning in first.warnings:
        report(f"warning: {warning}")
    if not first.statements:
        return first.problems
    oid = next((step.table_oid for step in first.statements if step.table_oid), 0)
    with ddl.turn(connection, oid, f"table {table.table}", report=report):
        for attempt in range(1, ATTEMPTS + 1):
            now = _prepare_table(connection, table, vector_schema, choices)
            if not now.statements:
                return now.problems
            try:
                run(now.statements)
            except (
                errors.DeadlockDetected,
                errors.LockNotAvailable,
                errors.QueryCanceled,
            ) as error:
                if attempt == ATTEMPTS:
                    raise SchemaError(
                        f"table {table.table}: gave up after {ATTEMPTS} attempts: {error}; "
                        "run this again when the table is quieter"
                    ) from None
                report(f"table {table.table}: {error}; looking again at what is missing")
    return now.problems


def _prepare_table(
    connection: Connection, table: TableSpec, vector_schema: str | None, choices: Choices
) -> Plan:
    result = Plan()
    try:
        facts = catalogue.describe_table(
            connection, table, check_expressions=False, vector_schema=vector_schema
        )
        columns = [Column(table, embedding, facts) for embedding in table.embeddings]
        columns = [c for c in columns if _identity(connection, c, choices, result)]
        if not columns:
            return result
        _plan_columns(connection, columns, choices, result)
    except PipelineError as error:
        result.problems.append(error)
    return result


def _identity(connection: Connection, column: Column, choices: Choices, result: Plan) -> bool:
    """Whether the column may be worked on; notes the problem when it may not."""
    if project_schema.version(connection) in (None, 0):
        return True
    found = registry.lookup(connection, column)
    if found is None:
        return True
    difference = registry.compare(connection, column, choices.environment, found)
    if difference is None:
        return True
    if difference.model_changed:
        allowed = False
    else:
        allowed = (choices.accept_reembed or not difference.reembeds) and (
            choices.take_ownership or not difference.environment_changed
        )
    if allowed:
        return True
    result.problems.append(IdentityError(difference.message(column)))
    return False


def _plan_columns(
    connection: Connection, columns: list[Column], choices: Choices, result: Plan
) -> None:
    facts, table = columns[0].facts, columns[0].table
    changes: list[sql.Composable] = []
    for column in columns:
        changes += _missing_columns(column)
    if changes:
        result.statements.append(
            ddl.statement(
                connection,
                sqlfiles.compose(
                    "table/change_columns",
                    table=columns[0].relation,
                    changes=sql.SQL(", ").join(changes),
                ),
                f"add the missing columns of {table.table}",
                table=table.table,
                table_oid=facts.oid,
            )
        )
    existing = existing_indexes(connection, facts.oid)
    wanted = wanted_queues(connection, columns)

    for column in columns:
        of_column = [index for index in wanted if index.column is column]
        registration = _registration(connection, column, choices)
        for position, index in enumerate(of_column):
            last = position == len(of_column) - 1
            result.statements += plan_index(
                connection, index, existing, when_built=registration if last else ()
            )


def _registration(connection: Connection, column: Column, choices: Choices) -> list[Statement]:
    if project_schema.version(connection) not in (None, 0):
        found = registry.lookup(connection, column)
        if found is not None and registry.agrees(connection, column, choices.environment, found):
            return []
    return [registry.register_statement(connection, column, choices.environment)]


def _missing_columns(column: Column) -> list[sql.Composable]:
    """The clauses that add the vector and the fingerprint; SchemaError where one is unfit."""
    facts, embedding = column.facts, column.embedding
    clauses: list[sql.Composable] = []
    vector = facts.attributes.get(embedding.column)
    if vector is None:
        clauses.append(sql.SQL("ADD COLUMN {} {}").format(column.vector, column.vector_type))
    else:
        if (vector.type_schema, vector.type_name) != (facts.vector_schema, "vector"):
            raise SchemaError(
                f"{column} exists already, as {vector.type}; an embedding column is "
                f"vector({embedding.dimensions}). Choose another name for the column"
            )
        if vector.modifier != embedding.dimensions:
            raise SchemaError(
                f"{column} exists already, as {vector.type}; {embedding.model} needs "
                f"vector({embedding.dimensions}). Choose another name for the column"
            )
        if vector.not_null or vector.generated:
            raise SchemaError(
                f"{column} exists already and is "
                f"{'NOT NULL' if vector.not_null else 'generated by Postgres'}; an embedding "
                "column has to take NULL for rows without text, and vectors for the others"
            )
    fingerprint = facts.attributes.get(embedding.fingerprint_column)
    if fingerprint is None:
        clauses.append(sql.SQL("ADD COLUMN {} uuid").format(column.fingerprint))
    elif fingerprint.type != "uuid" or fingerprint.not_null or fingerprint.generated:
        raise SchemaError(
            f"table {column.table.table} has a column {embedding.fingerprint_column} already, as "
            f"{fingerprint.type}; that name is needed for the fingerprint (a nullable uuid) of "
            f"{embedding.column}. Rename it, or choose another name for the embedding column"
        )
    return clauses


def _together(problems: Sequence[PipelineError]) -> PipelineError:
    if len(problems) == 1:
        return problems[0]
    kinds = {type(problem) for problem in problems}
    kind = IdentityError if IdentityError in kinds else SchemaError
    return kind("\n\n".join(str(problem) for problem in problems))


def warn_of_triggers(facts: TableFacts, columns: Sequence[Column]) -> list[str]:
    """The user's triggers that writing vectors will fire."""
    written = {
        name
        for column in columns
        for name in (column.embedding.column, column.embedding.fingerprint_column)
    }
    firing = [t for t in facts.update_triggers if not t.columns or written & set(t.columns)]
    if not firing:
        return []
    names = ", ".join(trigger.name for trigger in firing)
    return [
        f"table {facts.schema}.{facts.name}: writing a vector updates its row and so fires "
        f"{'these triggers' if len(firing) > 1 else 'the trigger'}: {names}"
    ]


def apply_files(
    connection: Connection, files: Sequence[Path], *, report: Report = quiet
) -> list[str]:
    """Apply the user's own SQL files in the given order; returns the names of those applied now.

    Each runs in one transaction together with its record (name and SHA-256). One that was applied
    before is skipped; one that has changed since is a SchemaError, before anything is applied.
    """
    steps = project_schema.plan_project(connection)
    if steps:
        with ddl.turn(connection, 0, "the project's own schema", report=report):
            for step in project_schema.plan_project(connection):
                ddl.execute(connection, step, report=report)
    known = dict(
        connection.execute("SELECT name, sha256 FROM embedding_pipeline.applied_file").fetchall()
    )
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    digests = {file: sha256(text.encode()).hexdigest() for file, text in texts.items()}
    for file in files:
        if known.get(file.name, digests[file]) != digests[file]:
            raise SchemaError(
                f"{file}: a file of this name was applied before, with other content; "
                "put it back as it was and write the change as a new file"
            )
    applied = []
    for file in files:
        if file.name in known:
            report(f"{file.name}: applied before")
            continue
        try:
            with connection.transaction():
                connection.execute(texts[file].encode())
                connection.execute(
                    "INSERT INTO embedding_pipeline.applied_file (name, sha256) VALUES ($1, $2)",
                    [file.name, digests[file]],
                )
        except psycopg.DatabaseError as error:
            raise SchemaError(f"{file}: {str(error).strip()}; nothing of it was applied") from None
        report(f"{file.name}: applied")
        applied.append(file.name)
    return applied
