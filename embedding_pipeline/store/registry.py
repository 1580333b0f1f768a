"""Identity: which recipe fills a column, from which text, and which environment may write it.

A column never holds two recipes' vectors, and a one-word edit in YAML never becomes a bill: what
the YAML says is compared with what the registry says at the start of every run and sensor tick.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row

from embedding_pipeline.errors import IdentityError, SchemaError
from embedding_pipeline.store import ddl, sqlfiles
from embedding_pipeline.store.column import Column

Connection = psycopg.Connection[Any]
Cost = Callable[[Column, int], str]
"""What embedding so many rows of a column would cost, in words."""


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
    """Every registered column; SchemaError when the project's schema is not there yet."""
    return _read(connection, "registry/all", [])


def lookup(connection: Connection, column: Column) -> RegisteredColumn | None:
    """What the registry says of one column."""
    rows = _read(
        connection,
        "registry/one",
        [column.facts.schema, column.facts.name, column.embedding.column],
    )
    return rows[0] if rows else None


def verify(connection: Connection, column: Column, environment: str) -> None:
    """IdentityError unless the registry says what the YAML says. One query.

    Raises SchemaError when the column is not registered (`migrate` has not run).
    """
    found = lookup(connection, column)
    if found is None:
        raise SchemaError(
            f"{column} is not set up in this database; run `embedding-pipeline migrate`"
        )
    difference = compare(connection, column, environment, found)
    if difference is not None:
        raise IdentityError(difference.message(column))


@dataclass(frozen=True)
class Difference:
    """How YAML and registry differ: their two sides, and what may be done about it."""

    sides: tuple[tuple[str, str, str], ...]
    """(what, in the database, in the YAML)"""
    model_changed: bool
    environment_changed: bool
    recipe_changed: bool
    text_changed: bool

    @property
    def reembeds(self) -> bool:
        """Whether accepting it makes stored vectors pending."""
        return self.recipe_changed or self.text_changed

    def message(self, column: Column, rows: str | None = None) -> str:
        """The error for a person: both sides and the ways out."""
        lines = [f"{column}: the YAML does not say what this column was filled with."]
        for what, stored, wanted in self.sides:
            lines += [f"  {what} in the database: {stored}", f"  {what} in the YAML:     {wanted}"]
        if rows:
            lines.append(f"  {rows}")
        lines.append("Nothing of this column is touched until you choose:")
        lines.append("  - put the YAML back as it was")
        if self.model_changed:
            lines.append(
                "  - give the new model its own column (vectors of two models cannot be compared)"
            )
        elif self.recipe_changed or self.text_changed:
            lines.append("  - give the new text a new column")
            lines.append(
                "  - embed every row again in place: `embedding-pipeline migrate --accept-reembed`"
                + (
                    " (without the flag, `migrate` accepts a mere change of spelling)"
                    if not self.recipe_changed
                    else ""
                )
            )
        if self.recipe_changed or self.text_changed:
            lines.append(
                "  - throw this column's vectors away: "
                f"`embedding-pipeline reset {column.table.table} {column.embedding.column}`"
            )
        if self.environment_changed:
            lines.append(
                "  - make this environment the column's owner: "
                "`embedding-pipeline migrate --take-ownership` (the other one then stops)"
            )
        return "\n".join(lines)


def compare(
    connection: Connection, column: Column, environment: str, found: RegisteredColumn
) -> Difference | None:
    """How a column's YAML and its registration differ; None when they agree."""
    embedding = column.embedding
    expected = rendered(connection, column)
    sides: list[tuple[str, str, str]] = []
    model_changed = (found.model, found.dimensions) != (embedding.model, embedding.dimensions)
    recipe_changed = found.recipe != embedding.recipe
    text_changed = _without_recipe(connection, found.expected_expression, found.recipe) != (
        _without_recipe(connection, expected, embedding.recipe)
    )
    if recipe_changed:
        sides.append(("recipe", found.recipe, embedding.recipe))
    if text_changed:
        sides.append(
            (
                "text",
                _without_recipe(connection, found.expected_expression, found.recipe),
                _without_recipe(connection, expected, embedding.recipe),
            )
        )
    if found.environment != environment:
        sides.append(("environment", found.environment, environment))
    if not sides:
        return None
    return Difference(
        sides=tuple(sides),
        model_changed=model_changed,
        environment_changed=found.environment != environment,
        recipe_changed=recipe_changed,
        text_changed=text_changed,
    )


def agrees(
    connection: Connection, column: Column, environment: str, found: RegisteredColumn
) -> bool:
    """Whether the registration is what `register` would write, provider included."""
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
    return column.expected.as_string(connection)


def register_statement(connection: Connection, column: Column, environment: str) -> ddl.Statement:
    """The statement that writes a column's identity into the registry."""
    embedding = column.embedding
    return ddl.statement(
        connection,
        sqlfiles.compose(
            "registry/register",
            table_schema=sql.Literal(column.facts.schema),
            table_name=sql.Literal(column.facts.name),
            column_name=sql.Literal(embedding.column),
            provider=sql.Literal(embedding.provider),
            model=sql.Literal(embedding.model),
            dimensions=sql.Literal(embedding.dimensions),
            recipe=sql.Literal(embedding.recipe),
            expected_expression=sql.Literal(rendered(connection, column)),
            environment=sql.Literal(environment),
        ),
        f"register {column}: {embedding.model}, written by environment {environment}",
        table=str(column),
    )


def register(connection: Connection, column: Column, environment: str) -> None:
    """Write a column's identity as the YAML has it, whatever was registered before."""
    ddl.execute(connection, register_statement(connection, column, environment))


def _without_recipe(connection: Connection, expression: str, recipe: str) -> str:
    return expression.replace(sql.Literal(recipe).as_string(connection), "'<recipe>'")


def _read(connection: Connection, name: str, parameters: list[str]) -> list[RegisteredColumn]:
    try:
        with connection.cursor(row_factory=class_row(RegisteredColumn)) as cursor:
            return cursor.execute(sqlfiles.query(name), parameters).fetchall()
    except (errors.UndefinedTable, errors.InvalidSchemaName):
        raise SchemaError(
            "this database is not set up for the project; run `embedding-pipeline migrate`"
        ) from None
