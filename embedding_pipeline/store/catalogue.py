"""What the database's catalogue says of a source table, and whether that fits its YAML.

Reading takes no lock beyond that of a SELECT. Whatever does not fit is a SchemaError that says
what was looked for, what is there, and what to do.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.spec import HashPartitions, MonthPartitions, TableSpec
from embedding_pipeline.store import expressions, sqlfiles
from embedding_pipeline.store.column import Column, ColumnFacts, TableFacts, Trigger

Connection = psycopg.Connection[Any]

MONTH_TYPES = {"date", "timestamp without time zone", "timestamp with time zone"}
_NOT_TABLES = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "S": "a sequence",
    "i": "an index",
    "I": "an index",
    "c": "a composite type",
}


def describe_table(
    connection: Connection,
    table: TableSpec,
    *,
    check_expressions: bool = True,
    vector_schema: str | None = None,
) -> TableFacts:
    """What the catalogue says of a table, checked against its YAML.

    With `check_expressions` (an empty temporary clone in a transaction that is rolled back, and a
    few hundred evaluations), `text` and `eligible` are also tried for what an index predicate
    needs: see `check_expressions`. Without it, only that they parse. `vector_schema` stands in
    for the schema of a pgvector that is still to be installed.

    Raises SchemaError.
    """
    facts = _facts(connection, table, vector_schema)
    bound = [Column(table, embedding, facts) for embedding in table.embeddings]
    if check_expressions:
        expressions.check(connection, bound)
    return facts


def bind_columns(
    connection: Connection, table: TableSpec, *, check_expressions: bool = False
) -> list[Column]:
    """A table's embedding columns, bound to what the catalogue says. One query.

    `migrate` checks the expressions before they stand in an index; by default they are not
    checked again here. Raises SchemaError.
    """
    facts = describe_table(connection, table, check_expressions=check_expressions)
    return [Column(table, embedding, facts) for embedding in table.embeddings]


def _facts(connection: Connection, table: TableSpec, vector_schema: str | None) -> TableFacts:
    name = table.qualified
    quoted = sql.Identifier(*filter(None, (name.schema, name.name))).as_string(connection)
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(sqlfiles.query("catalogue/table"), [quoted]).fetchone()
    if row is None:
        raise SchemaError(_missing_table(connection, table))
    title = f"table {table.table}"
    if connection.info.server_version < 140000:
        raise SchemaError(
            f"this server is Postgres {connection.info.server_version // 10000}; version 14 or "
            "newer is needed (hash_record_extended)"
        )
    if row["encoding"] != "UTF8":
        raise SchemaError(
            f"the database's encoding is {row['encoding']}; it must be UTF8, because fingerprints "
            "are made from the text's bytes (CREATE DATABASE … ENCODING 'UTF8')"
        )
    if row["kind"] in _NOT_TABLES:
        raise SchemaError(
            f"{title} is {_NOT_TABLES[row['kind']]}; embedding columns are added to a table and "
            "written in it, so name the table that holds the rows"
        )
    if row["is_partition"]:
        raise SchemaError(
            f"{title} is a partition of another table; name the partitioned table itself"
        )
    if row["children"]:
        raise SchemaError(
            f"{title} has tables that inherit from it; their rows are not in its indexes, so "
            "coverage would lie. Declarative partitioning is supported, inheritance is not"
        )
    if row["foreign_partitions"]:
        raise SchemaError(
            f"{title} has partitions that are foreign tables "
            f"({', '.join(row['foreign_partitions'])}); rows there can be neither indexed nor "
            "written"
        )
    if not row["may_select"]:
        raise SchemaError(
            f"{title}: role {row['role']} may not read it; "
            f"GRANT SELECT, UPDATE ON {quoted} TO {row['role']}"
        )
    if row["rows_hidden"]:
        raise SchemaError(
            f"{title} has row-level security that applies to role {row['role']}: rows that its "
            "policies hide would never be embedded, and coverage would not show it. Connect as "
            f"the table's owner, or ALTER ROLE {row['role']} BYPASSRLS"
        )
    attributes = {
        column["name"]: ColumnFacts(
            name=column["name"],
            type=column["type"],
            type_name=column["type_name"],
            type_schema=column["type_schema"],
            modifier=column["modifier"],
            not_null=column["not_null"],
            generated=column["generated"],
        )
        for column in row["columns"]
    }
    schema_of_vector = row["vector_schema"] or vector_schema
    if schema_of_vector is None:
        raise SchemaError(
            "the extension pgvector is not installed in this database; "
            "`embedding-pipeline migrate` installs it (or, as a privileged role: "
            "CREATE EXTENSION vector)"
        )
    facts = TableFacts(
        schema=row["schema"],
        name=row["name"],
        oid=row["oid"],
        columns={name: attribute.type for name, attribute in attributes.items()},
        vector_schema=schema_of_vector,
        is_partitioned=row["kind"] == "p",
        attributes=attributes,
        update_triggers=tuple(
            Trigger(
                name=trigger["name"],
                definition=trigger["definition"],
                function=trigger["function"],
                source=trigger["source"],
                arguments=trigger["arguments"],
                row=trigger["row"],
                before=trigger["before"],
                columns=tuple(trigger["columns"]),
            )
            for trigger in row["update_triggers"]
        ),
        owned=row["owned"],
        role=row["role"],
    )
    _check_columns(table, facts)
    _check_key(table, facts, row["unique_keys"])
    _check_partition_column(table, facts)
    return facts


def _missing_table(connection: Connection, table: TableSpec) -> str:
    name = table.qualified
    rows = connection.execute(sqlfiles.query("catalogue/similar_tables")).fetchall()
    elsewhere = [f"{schema}.{found}" for schema, found in rows if found == name.name]
    if elsewhere:
        where = f"in schema {name.schema}" if name.schema else "on the search path"
        return f"there is no table {name.name} {where}; did you mean {' or '.join(elsewhere)}?"
    path = [schema for (schema,) in connection.execute("SELECT unnest(current_schemas(false))")]
    known = {found if schema in path else f"{schema}.{found}": None for schema, found in rows}
    return f"there is no table {table.table} in this database{_did_you_mean(table.table, known)}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    lower = {candidate.lower(): candidate for candidate in known}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, 2, 0.6)]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(known[:12])}{' …' if len(known) > 12 else ''}" if known else ""


def _check_columns(table: TableSpec, facts: TableFacts) -> None:
    used = [(name, "id_column") for name in table.key_columns]
    if table.tenant_column is not None:
        used.append((table.tenant_column, "tenant_column"))
    partition_column = getattr(table.partitions, "column", None)
    if partition_column is not None:
        used.append((partition_column, "partitions"))
    own = {
        name
        for embedding in table.embeddings
        for name in (embedding.column, embedding.fingerprint_column)
    }
    for name, where in used:
        if name not in facts.columns:
            known = [column for column in facts.columns if column not in own]
            raise SchemaError(
                f"table {table.table} has no column {name} ({where} in its YAML)"
                f"{_did_you_mean(name, known)}"
            )


def _check_key(table: TableSpec, facts: TableFacts, unique_keys: list[list[str]]) -> None:
    keys = set(table.key_columns)
    listed = ", ".join(table.key_columns)
    if not any(set(unique) <= keys for unique in unique_keys):
        there = " or ".join(f"({', '.join(unique)})" for unique in unique_keys)
        raise SchemaError(
            f"table {table.table}: nothing guarantees that ({listed}) is unique, so a vector could "
            "reach the wrong row; id_column needs a primary key or a unique index over exactly "
            f"these columns{f' (there is one over {there})' if there else ''}"
        )
    nullable = [name for name in table.key_columns if not facts.attributes[name].not_null]
    if nullable:
        raise SchemaError(
            f"table {table.table}: key column {nullable[0]} may be NULL; a key has to find its "
            "row: ALTER TABLE … ALTER COLUMN … SET NOT NULL, or name the primary key"
        )


def _check_partition_column(table: TableSpec, facts: TableFacts) -> None:
    partitions = table.partitions
    if isinstance(partitions, HashPartitions) or not isinstance(partitions, MonthPartitions):
        return
    column = partitions.column
    kind = facts.columns[column].split("(")[0]
    normal = re.sub(r"\(\d\)", "", facts.columns[column])
    if normal not in MONTH_TYPES:
        raise SchemaError(
            f"table {table.table}: partitions by month need a date or timestamp column; "
            f"{column} is {kind.strip()}"
        )
    for trigger in firing_triggers(table, facts):
        if trigger.row and trigger.before and _assigns(trigger, column):
            raise SchemaError(
                f"table {table.table}: trigger {trigger.name} sets {column} on every update, so "
                "embedding a row would move it into this month's partition; partition by a column "
                "that an update leaves alone (when the row was created), or by hash"
            )


def firing_triggers(table: TableSpec, facts: TableFacts) -> list[Trigger]:
    """The user's triggers that writing a vector fires: not those for UPDATE OF other columns."""
    written = {
        name
        for embedding in table.embeddings
        for name in (embedding.column, embedding.fingerprint_column)
    }
    return [t for t in facts.update_triggers if not t.columns or written & set(t.columns)]


def _assigns(trigger: Trigger, column: str) -> bool:
    """Whether a trigger's function sets a column of the new row, as far as its source tells.

    Reads PL/pgSQL assignments (`NEW.c := …`, `NEW.c = …`, `SELECT … INTO NEW.c`) and the argument
    of contrib's `moddatetime`. What is assembled at run time is not seen.
    """
    if trigger.function == "moddatetime":
        return column in trigger.arguments.split("\\000")
    unquoted = re.escape(column) if re.fullmatch(r"[a-z_][a-z0-9_$]*", column) else None
    names = [re.escape('"' + column.replace('"', '""') + '"')]
    if unquoted:
        names.append(unquoted)
    target = rf"\bnew\s*\.\s*(?:{'|'.join(names)})(?![\w$\"])"
    source = re.sub(r"--[^\n]*|/\*.*?\*/", " ", trigger.source, flags=re.DOTALL)
    return bool(
        re.search(
            rf"(?:^|;|\bbegin\b|\bthen\b|\belse\b|\bloop\b)\s*{target}\s*:?=(?!=)",
            source,
            re.IGNORECASE,
        )
        or re.search(rf"\binto\s+(?:strict\s+)?[^;]*?{target}", source, re.IGNORECASE)
    )
