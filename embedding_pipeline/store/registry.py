"""Identity: which recipe fills a column, from which text, and which environment may write it.

A column never holds two recipes' vectors, and a one-word edit in YAML never becomes a bill: what
the YAML says is compared with what the registry says at the start of every run and sensor tick.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row

from embedding_pipeline.errors import IdentityError, SchemaError
from embedding_pipeline.store import ddl, project_schema, sqlfiles
from embedding_pipeline.store.column import BLANKS_SQL, Column
from embedding_pipeline.store.ddl import Statement

Connection = psycopg.Connection[Any]
Cost = Callable[[Column, int], str]
"""What embedding so many rows of a column would cost, in words: `about $1.20`."""


@dataclass(frozen=True)
class RegisteredColumn:
    """What the registry says of an embedding column."""

    table_schema: str
    table_name: str
    column_name: str
    provider: str
    model: str
    dimensions: int
    recipe: str
    expected_expression: str
    environment: str
    pending_since: datetime | None
    written_at: datetime | None
    evaluated_at: datetime | None
    created_at: datetime
    updated_at: datetime


def registered(connection: Connection) -> list[RegisteredColumn]:
    """Every registered column. SchemaError when the project's schema is not there yet."""
    return _read(connection, "registry/all", [])


def lookup(connection: Connection, column: Column) -> RegisteredColumn | None:
    """What the registry says of one column. SchemaError as for `registered`."""
    names = [column.facts.schema, column.facts.name, column.embedding.column]
    rows = _read(connection, "registry/one", names)
    return rows[0] if rows else None


def verify(
    connection: Connection, column: Column, environment: str, *, cost: Cost | None = None
) -> None:
    """IdentityError unless the registry says what the YAML says. One query (three at first).

    With `cost`, the error also says how many rows would be embedded again and what that costs;
    that takes a scan of the table, and only when there is an error to raise. Raises SchemaError
    when the column is not registered, or the project's tables are of an older version (`migrate`
    has not run).
    """
    found = lookup(connection, column)
    if found is None:
        raise SchemaError(
            f"{column} is not set up in this database; run `embedding-pipeline migrate`"
        )
    project_schema.require_current(connection)
    difference = compare(connection, column, environment, found)
    if difference is not None:
        bill = bill_of(connection, column, cost) if cost and difference.reembeds else None
        raise IdentityError(difference.message(column, bill))


@dataclass(frozen=True)
class Difference:
    """How YAML and registry differ, side by side."""

    sides: tuple[tuple[str, str, str], ...]
    """(what, in the database, in the YAML)"""
    model_changed: bool
    recipe_changed: bool
    text_changed: bool
    environment_changed: bool

    @property
    def reembeds(self) -> bool:
        """Whether accepting it makes stored vectors pending."""
        return self.recipe_changed or self.text_changed

    def message(self, column: Column, bill: str | None = None) -> str:
        """The error for a person: both sides, what it would cost, and the ways out."""
        place = f"{column.table.table} {column.embedding.column}"
        lines = [f"{column}: the YAML asks for something else than what fills this column."]
        width = max(len(what) for what, _, _ in self.sides)
        for what, stored, wanted in self.sides:
            lines.append(f"  {what:<{width}}  in the database: {stored}")
            lines.append(f"  {'':<{width}}  in the YAML:     {wanted}")
        if bill:
            lines.append(f"  {bill}")
        lines.append("Nothing of this column is touched until you choose one of:")
        lines.append("  - put the YAML back as it was")
        if self.model_changed:
            lines.append(
                "  - give the new model a new column (vectors of two models cannot be compared)"
            )
        elif self.reembeds:
            lines.append("  - keep this column and give the new text a new one")
            lines.append(
                "  - embed its rows again in place: `embedding-pipeline migrate --accept-reembed`"
            )
        if self.text_changed and not self.recipe_changed:
            lines.append(
                "  - if only the spelling changed: `embedding-pipeline migrate` notices and "
                "accepts that"
            )
        if self.reembeds:
            lines.append(
                "  - drop the column with its vectors and start anew: "
                f"`embedding-pipeline reset {place}`"
            )
        if self.environment_changed:
            lines.append(
                "  - make this environment its owner: `embedding-pipeline migrate "
                "--take-ownership` (the other environment's runs then stop)"
            )
        return "\n".join(lines)


def compare(
    connection: Connection, column: Column, environment: str, found: RegisteredColumn
) -> Difference | None:
    """How a column's YAML and its registration differ; None when they agree.

    The provider is not compared: another server for the same model is the same recipe.
    """
    embedding = column.embedding
    sides: list[tuple[str, str, str]] = []
    if found.recipe != embedding.recipe:
        sides.append(("recipe", found.recipe, embedding.recipe))
    stored = _parts(connection, found.expected_expression, found.recipe)
    wanted = _parts(connection, rendered(connection, column), embedding.recipe)
    if stored.keys() != wanted.keys():
        stored = {"expression": found.expected_expression}
        wanted = {"expression": rendered(connection, column)}
    text_sides = [
        (what, stored[what], wanted[what]) for what in wanted if stored[what] != wanted[what]
    ]
    sides += text_sides
    if found.environment != environment:
        sides.append(("environment", found.environment, environment))
    if not sides:
        return None
    return Difference(
        sides=tuple(sides),
        model_changed=(found.model, found.dimensions) != (embedding.model, embedding.dimensions),
        recipe_changed=found.recipe != embedding.recipe,
        text_changed=bool(text_sides),
        environment_changed=found.environment != environment,
    )


def _parts(connection: Connection, expression: str, recipe: str) -> dict[str, str]:
    """`text` and `eligible` out of an expected-expression, as a person wrote them."""
    blanks = re.escape(BLANKS_SQL.as_string(connection))
    literal = re.escape(sql.Literal(recipe).as_string(connection))
    match = re.fullmatch(
        rf"CASE WHEN btrim\(\((?P<text>.+)\)::text, {blanks}\) <> ''(?: AND \((?P<eligible>.+)\))?"
        rf" THEN md5\({literal} \|\| E'\\n' \|\| \((?P=text)\)::text\)::uuid END",
        expression,
        re.DOTALL,
    )
    if match is None:
        return {"expression": expression}
    return {"text": match["text"], "eligible": match["eligible"] or "every row with text"}


def agrees(
    connection: Connection, column: Column, environment: str, found: RegisteredColumn
) -> bool:
    """Whether the registration is to the letter what `register` would write."""
    embedding = column.embedding
    return (
        found.provider,
        found.model,
        found.dimensions,
        found.recipe,
        found.expected_expression,
        found.environment,
    ) == (
        embedding.provider,
        embedding.model,
        embedding.dimensions,
        embedding.recipe,
        rendered(connection, column),
        environment,
    )


def rendered(connection: Connection, column: Column) -> str:
    """The expected-expression as the registry keeps it."""
    return column.definition.as_string(connection)


def bill_of(connection: Connection, column: Column, cost: Cost | None = None) -> str:
    """How many rows the YAML's expression would have embedded again, in words; scans the table."""
    if column.embedding.fingerprint_column not in column.facts.columns:
        return "no row has a fingerprint yet"
    query = sqlfiles.compose(
        "registry/rows",
        table=column.relation,
        expected=column.expected,
        fingerprint=column.fingerprint,
    )
    try:
        row = connection.execute(query).fetchone()
    except psycopg.DatabaseError as error:
        return f"how many rows would be embedded again could not be counted: {error}"
    assert row is not None
    rows: int = row[0]
    return f"{rows:,} rows would be embedded again" + (f", {cost(column, rows)}" if cost else "")


def register_statement(
    connection: Connection,
    column: Column,
    environment: str,
    found: RegisteredColumn | None = None,
) -> Statement:
    """The statement that writes a column's identity as the YAML has it."""
    embedding = column.embedding
    if found is None:
        why = f"register {column}: {embedding.model}, written by environment {environment}"
    else:
        changed = [
            what
            for what, before, after in (
                ("provider", found.provider, embedding.provider),
                ("model", found.model, embedding.model),
                ("recipe", found.recipe, embedding.recipe),
                ("text", found.expected_expression, rendered(connection, column)),
                ("environment", found.environment, environment),
            )
            if before != after
        ]
        why = f"register the changed {', '.join(changed)} of {column}"
    return Statement(
        sqlfiles.compose(
            "registry/register",
            **_names(column),
            provider=sql.Literal(embedding.provider),
            model=sql.Literal(embedding.model),
            dimensions=sql.Literal(embedding.dimensions),
            recipe=sql.Literal(embedding.recipe),
            expected_expression=sql.Literal(rendered(connection, column)),
            environment=sql.Literal(environment),
        ).as_string(connection),
        why,
        table=column.table.table,
    )


def register(connection: Connection, column: Column, environment: str) -> None:
    """Write a column's identity as the YAML has it, whatever was registered before."""
    ddl.execute(connection, register_statement(connection, column, environment))


def forget(column: Column) -> sql.Composed:
    """What removes a column's identity and its quarantined rows."""
    return sqlfiles.compose("registry/forget", **_names(column))


def _names(column: Column) -> dict[str, sql.Composable]:
    return {
        "table_schema": sql.Literal(column.facts.schema),
        "table_name": sql.Literal(column.facts.name),
        "column_name": sql.Literal(column.embedding.column),
    }


def _read(connection: Connection, name: str, parameters: list[str]) -> list[RegisteredColumn]:
    try:
        with connection.cursor(row_factory=class_row(RegisteredColumn)) as cursor:
            return cursor.execute(sqlfiles.query(name), parameters).fetchall()
    except (errors.UndefinedTable, errors.InvalidSchemaName):
        raise SchemaError(
            "this database is not set up for the project; run `embedding-pipeline migrate`"
        ) from None
