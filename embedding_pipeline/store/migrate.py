"""Bring the database to what the YAML says: columns, pending indexes, the project's own tables.

`prepare` looks at the catalogue and says what is missing; `migrate` executes exactly that and
looks again until nothing is missing. A database that is right is only read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.errors import IdentityError, PipelineError, SchemaError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import catalogue, ddl, expressions, project_schema, registry, sqlfiles
from embedding_pipeline.store.column import Column, TableFacts
from embedding_pipeline.store.ddl import BusyError, Report, Statement, quiet, render
from embedding_pipeline.store.index_plan import (
    existing_indexes,
    plan_index,
    same_meaning,
    wanted_queues,
)
from embedding_pipeline.store.user_files import apply_files, plan_files

__all__ = [
    "Plan",
    "Statement",
    "apply_files",
    "migrate",
    "plan",
    "plan_files",
    "prepare",
    "render",
    "reset",
]

Connection = psycopg.Connection[Any]


@dataclass
class Plan:
    """What a migration would do, what it would leave undone, and what its user should know."""

    statements: list[Statement] = field(default_factory=list)
    problems: list[PipelineError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    table_oid: int = 0

    def add(self, other: "Plan") -> None:
        """Append another plan."""
        self.statements += other.statements
        self.problems += other.problems
        self.warnings += other.warnings


@dataclass(frozen=True)
class _Choices:
    """What the user has decided about columns whose identity differs."""

    environment: str
    accept_reembed: bool
    take_ownership: bool
    cost: registry.Cost | None


def prepare(
    connection: Connection,
    tables: Sequence[TableSpec],
    *,
    environment: str | None = None,
    accept_reembed: bool = False,
    take_ownership: bool = False,
    cost: registry.Cost | None = None,
) -> Plan:
    """What `migrate` would do with the same arguments, and the errors that it would end with.

    Only reads (and makes empty temporary tables in transactions that are rolled back).
    """
    choices = _choices(environment, accept_reembed, take_ownership, cost)
    extension, vector_schema = project_schema.plan_extension(connection)
    whole = Plan(extension + project_schema.plan_project(connection))
    for table in tables:
        whole.add(_prepare_table(connection, table, vector_schema, choices))
    return whole


def plan(connection: Connection, tables: Sequence[TableSpec], **choices: Any) -> list[Statement]:
    """The statements that `migrate` would execute; [] when there is nothing to do.

    Tables and columns that `migrate` would leave untouched and report are not in it; `prepare`
    has them as `problems`.
    """
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

    Safe to run again at any time, and after it was interrupted anywhere. A table or column that
    cannot be brought there is left untouched, the others go on, and the error comes at the end.
    `accept_reembed` accepts a changed text (not a changed model), `take_ownership` a column of
    another environment; `cost` puts a price on the rows that an error speaks of; `patience` is
    for how many seconds a lock on a table is tried for.

    Raises IdentityError, SchemaError; several problems become one error with all their texts.
    """
    choices = _choices(environment, accept_reembed, take_ownership, cost)

    def project() -> list[Statement]:
        return [
            *project_schema.plan_extension(connection)[0],
            *project_schema.plan_project(connection),
        ]

    executed: list[Statement] = []
    if project():
        executed += ddl.carry_out(
            connection, 0, "the project's own schema", project, report=report, patience=patience
        )
    problems: list[PipelineError] = []
    for table in tables:
        try:
            done, left = _migrate_table(connection, table, choices, report, patience)
            executed += done
            problems += left
        except PipelineError as error:
            problems.append(error)
    if problems:
        raise _together(problems)
    return executed


def reset(
    connection: Connection,
    column: Column,
    *,
    report: Report = quiet,
    environment: str | None = None,
    patience: float = ddl.PATIENCE_SECONDS,
) -> list[Statement]:
    """Drop a column with its vectors and set it up empty, as the YAML has it now.

    One ALTER TABLE drops and adds the vector and the fingerprint, so the table is never without
    them; the indexes go with it, and the pending index is built again. The quarantine of the
    column is forgotten. Raises SchemaError, for instance when a view reads the column, and
    IdentityError when it belongs to another environment.
    """
    facts = column.facts
    choices = _choices(environment, False, False, None)
    found = registry.lookup(connection, column)
    if found is not None and found.environment != choices.environment:
        raise IdentityError(
            f"{column} belongs to environment {found.environment}, not {choices.environment}; "
            "its vectors are not this one's to drop. To make this environment its owner: "
            "`embedding-pipeline migrate --take-ownership` (with the YAML that filled it)"
        )
    changes: list[sql.Composable] = []
    for name in (column.embedding.column, column.embedding.fingerprint_column):
        if name in facts.columns:
            changes.append(sql.SQL("DROP COLUMN {}").format(sql.Identifier(name)))
    changes += _additions(column)
    texts = (
        sqlfiles.compose(
            "table/change_columns", table=column.relation, changes=sql.SQL(", ").join(changes)
        ),
        registry.forget(column),
    )
    # one transaction: were the identity forgotten alone, another model could move in
    step = Statement(
        ";\n".join(text.as_string(connection) for text in texts),
        f"drop {column} with its vectors and add it empty",
        table=column.table.table,
        table_oid=facts.oid,
    )
    what = f"table {column.table.table}"
    ddl.carry_out(connection, facts.oid, what, lambda: [step], report=report, patience=patience)
    alone = column.table.model_copy(
        update={"embeddings": [column.embedding.model_copy(update={"baseline": None})]}
    )
    again = migrate(connection, [alone], report=report, environment=environment, patience=patience)
    return [step, *again]


def _choices(
    environment: str | None,
    accept_reembed: bool,
    take_ownership: bool,
    cost: registry.Cost | None,
) -> _Choices:
    return _Choices(
        environment=environment or load_settings().embedding_pipeline_environment,
        accept_reembed=accept_reembed,
        take_ownership=take_ownership,
        cost=cost,
    )


def _migrate_table(
    connection: Connection,
    table: TableSpec,
    choices: _Choices,
    report: Report,
    patience: float,
) -> tuple[list[Statement], list[PipelineError]]:
    vector_schema = project_schema.vector_schema(connection)
    now = _prepare_table(connection, table, vector_schema, choices)
    if not now.statements and not now.problems:
        return [], []
    for warning in now.warnings:
        report(f"warning: {warning}")

    def steps() -> list[Statement]:
        nonlocal now
        now = _prepare_table(connection, table, vector_schema, choices)
        if busy := _busy(now):
            raise busy
        return now.statements

    done = ddl.carry_out(
        connection,
        now.table_oid,
        f"table {table.table}",
        steps,
        report=report,
        patience=patience,
    )
    return done, now.problems


def _busy(plan: Plan) -> BusyError | None:
    return next((problem for problem in plan.problems if isinstance(problem, BusyError)), None)


def _prepare_table(
    connection: Connection, table: TableSpec, vector_schema: str | None, choices: _Choices
) -> Plan:
    result = Plan()
    try:
        facts = catalogue.describe_table(
            connection, table, check_expressions=False, vector_schema=vector_schema
        )
        result.table_oid = facts.oid
        columns = [Column(table, embedding, facts) for embedding in table.embeddings]
        expressions.check_syntax(connection, columns[0])
        known = _registrations(connection, columns)
        mine = [
            column
            for column in columns
            if _may_touch(connection, column, known.get(column.embedding.column), choices, result)
        ]
        if mine:
            _plan_columns(connection, mine, known, choices, result)
            if result.statements:
                result.warnings += _trigger_warnings(table, facts)
    except PipelineError as error:
        result.problems.append(error)
        result.statements.clear()
    except psycopg.DatabaseError as error:
        # for instance an index that another session has just dropped
        result.problems.append(
            SchemaError(f"table {table.table}: cannot read the catalogue: {ddl.primary(error)}")
        )
        result.statements.clear()
    return result


def _registrations(
    connection: Connection, columns: Sequence[Column]
) -> dict[str, registry.RegisteredColumn]:
    if not project_schema.version(connection):
        return {}
    found = ((column, registry.lookup(connection, column)) for column in columns)
    return {column.embedding.column: row for column, row in found if row is not None}


def _may_touch(
    connection: Connection,
    column: Column,
    known: registry.RegisteredColumn | None,
    choices: _Choices,
    result: Plan,
) -> bool:
    """Whether a column's identity allows work on it; notes the problem when it does not."""
    if known is None:
        return True
    difference = registry.compare(connection, column, choices.environment, known)
    if difference is None:
        return True
    spelling = (
        difference.text_changed
        and not difference.recipe_changed
        and same_meaning(connection, column, known.expected_expression)
    )
    reembeds = difference.reembeds and not spelling
    if (
        not difference.model_changed
        and (choices.accept_reembed or not reembeds)
        and (choices.take_ownership or not difference.environment_changed)
    ):
        return True
    bill = registry.bill_of(connection, column, choices.cost) if reembeds else None
    result.problems.append(IdentityError(difference.message(column, bill)))
    return False


def _plan_columns(
    connection: Connection,
    columns: Sequence[Column],
    known: dict[str, registry.RegisteredColumn],
    choices: _Choices,
    result: Plan,
) -> None:
    facts, table = columns[0].facts, columns[0].table
    missing: dict[str, list[sql.Composable]] = {}
    for column in columns:
        try:
            missing[column.embedding.column] = _missing(column)
        except SchemaError as error:
            result.problems.append(error)
    columns = [column for column in columns if column.embedding.column in missing]
    if not columns:
        return
    existing = existing_indexes(connection, facts.oid)
    wanted = wanted_queues(connection, columns)
    clauses: list[sql.Composable] = []
    names: list[str] = []
    steps: list[Statement] = []
    for column in columns:
        found = known.get(column.embedding.column)
        registration = (
            []
            if found and registry.agrees(connection, column, choices.environment, found)
            else [registry.register_statement(connection, column, choices.environment, found)]
        )
        of_column = [index for index in wanted if index.column is column]
        try:
            mine: list[Statement] = []
            for index in of_column:
                # after the last build: a registered column has its queue
                when_built = registration if index is of_column[-1] else ()
                mine += plan_index(connection, index, existing, when_built=when_built)
        except SchemaError as error:
            result.problems.append(error)
            continue
        steps += mine
        if missing[column.embedding.column]:
            clauses += missing[column.embedding.column]
            names.append(column.embedding.column)
    if any(step.undo for step in steps):
        expressions.check_totality(connection, columns)
    if clauses:
        result.statements.append(
            Statement(
                sqlfiles.compose(
                    "table/change_columns",
                    table=columns[0].relation,
                    changes=sql.SQL(", ").join(clauses),
                ).as_string(connection),
                f"add the columns for {', '.join(names)} to {table.table}",
                table=table.table,
                table_oid=facts.oid,
            )
        )
    result.statements += steps
    if result.statements and not facts.owned:
        # this role cannot execute them; whoever does has to let it do the daily work
        result.statements.append(
            Statement(
                sqlfiles.compose(
                    "table/grant", table=columns[0].relation, role=sql.Identifier(facts.role)
                ).as_string(connection),
                f"let role {facts.role}, which does not own {table.table}, fill its columns",
                table=table.table,
            )
        )


def _missing(column: Column) -> list[sql.Composable]:
    """The clauses that add the vector and the fingerprint; SchemaError where one is unfit."""
    facts, embedding = column.facts, column.embedding
    vector_clause, fingerprint_clause = _additions(column)
    clauses: list[sql.Composable] = []
    vector = facts.attributes.get(embedding.column)
    if vector is None:
        clauses.append(vector_clause)
    else:
        is_vector = (vector.type_schema, vector.type_name) == (facts.vector_schema, "vector")
        if not is_vector or vector.modifier != embedding.dimensions:
            raise SchemaError(
                f"{column} exists already, as {vector.type}, but {embedding.model} at "
                f"{embedding.dimensions} dimensions needs vector({embedding.dimensions}); choose "
                "another name for the embedding column"
            )
        if vector.not_null or vector.generated:
            raise SchemaError(
                f"{column} exists already and is "
                f"{'generated by Postgres' if vector.generated else 'NOT NULL'}; an embedding "
                "column has to take NULL for rows without text and vectors for the others"
            )
    fingerprint = facts.attributes.get(embedding.fingerprint_column)
    if fingerprint is None:
        clauses.append(fingerprint_clause)
    elif fingerprint.type != "uuid" or fingerprint.not_null or fingerprint.generated:
        raise SchemaError(
            f"table {column.table.table} already has a column {embedding.fingerprint_column}, as "
            f"{fingerprint.type}; that name is needed for the fingerprint (a nullable uuid) of "
            f"{embedding.column}. Rename it, or choose another name for the embedding column"
        )
    return clauses


def _additions(column: Column) -> tuple[sql.Composable, sql.Composable]:
    return (
        sql.SQL("ADD COLUMN {} {}").format(column.vector, column.vector_type),
        sql.SQL("ADD COLUMN {} uuid").format(column.fingerprint),
    )


def _trigger_warnings(table: TableSpec, facts: TableFacts) -> list[str]:
    firing = catalogue.firing_triggers(table, facts)
    if not firing:
        return []
    names = "; ".join(f"{trigger.name} ({trigger.definition})" for trigger in firing)
    return [
        f"table {table.table}: writing a vector is an UPDATE of its row and fires {names}. Let a "
        "trigger that should not see that name its columns (BEFORE UPDATE OF body …) or add "
        "WHEN (OLD.body IS DISTINCT FROM NEW.body)"
    ]


def _together(problems: Sequence[PipelineError]) -> PipelineError:
    if len(problems) == 1:
        return problems[0]
    identity = any(isinstance(problem, IdentityError) for problem in problems)
    kind = IdentityError if identity else SchemaError
    return kind("\n\n".join(str(problem) for problem in problems))
