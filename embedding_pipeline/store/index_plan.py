"""Which statements bring one index into being, given what the catalogue holds now.

The catalogue is looked at first and what is right is left alone. An INVALID left-over is dropped
and built again. An index of another definition is replaced without a gap: the new one is built
under a spare name, then the old one is dropped, then the new one is renamed. Every step leaves a
state from which the next plan goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.spec import short_name
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import BusyError, Statement
from embedding_pipeline.store.expressions import build_on_clone, clone

Connection = psycopg.Connection[Any]


_ADVICE = {
    "pending": "text or eligible fails for a row of the table. They stand in an index, so they "
    "have to give a text or NULL for every row; the unfinished index was dropped",
    "hnsw": "HNSW needs pgvector 0.5 or newer (ALTER EXTENSION vector UPDATE)",
}


@dataclass(frozen=True)
class Signature:
    """What makes two indexes the same, as the catalogue writes it."""

    method: str
    keys: tuple[str, ...]
    operator_classes: tuple[str, ...]
    collations: tuple[str | None, ...]
    predicate: str | None


@dataclass(frozen=True)
class Existing:
    """An index in the catalogue."""

    table_oid: int
    oid: int
    schema: str
    name: str
    partitioned: bool
    valid: bool
    parent_oid: int | None
    signature: Signature
    columns: frozenset[str]
    bytes: int
    tuples: float
    building_pid: int | None

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True)
class Wanted:
    """An index that an embedding column should have."""

    column: Column
    suffix: str
    """Last part of its name: `pending`, `fingerprint_index` or `hnsw`."""
    name: str
    file: str
    """The SQL file that creates it."""
    values: dict[str, sql.Composable]
    marker: str
    """A column that any earlier version of this index also depends on."""
    signature: Signature

    def matches(self, index: Existing) -> bool:
        """Whether an index has this definition."""
        return index.signature == self.signature

    def create(
        self, name: str, table: sql.Composable, *, concurrently: bool, only: bool
    ) -> sql.Composable:
        """The statement that creates it under a name on a table or partition."""
        return sqlfiles.compose(
            self.file,
            name=sql.Identifier(name),
            table=table,
            concurrently=sql.SQL("CONCURRENTLY " if concurrently else ""),
            only=sql.SQL("ONLY " if only else ""),
            **self.values,
        )


def existing_indexes(connection: Connection, table_oid: int) -> list[Existing]:
    """Every index of a table and of its partitions."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(sqlfiles.query("catalogue/indexes"), [table_oid]).fetchall()
    return [
        Existing(
            table_oid=row["table_oid"],
            oid=row["oid"],
            schema=row["schema"],
            name=row["name"],
            partitioned=row["kind"] == "I",
            valid=row["valid"],
            parent_oid=row["parent_oid"],
            signature=Signature(
                method=row["method"],
                keys=tuple(row["keys"]),
                operator_classes=tuple(row["operator_classes"]),
                collations=tuple(row["collations"]),
                predicate=row["predicate"],
            ),
            columns=frozenset(row["columns"]),
            bytes=row["bytes"],
            tuples=row["tuples"],
            building_pid=row["building_pid"],
        )
        for row in rows
    ]


def wanted_hnsw(connection: Connection, column: Column) -> Wanted:
    """The HNSW index by cosine distance."""
    row = connection.execute(b"SELECT quote_ident($1)", [column.embedding.column]).fetchone()
    assert row is not None
    return Wanted(
        column=column,
        suffix="hnsw",
        name=column.hnsw_index,
        file="index/hnsw",
        values={
            "vector": column.vector,
            "operator_class": sql.Identifier(column.facts.vector_schema, "vector_cosine_ops"),
        },
        marker=column.embedding.column,
        signature=Signature("hnsw", (row[0],), ("vector_cosine_ops",), (None,), None),
    )


def wanted_queues(connection: Connection, columns: Sequence[Column]) -> list[Wanted]:
    """The pending index of each column, and the fingerprint index where `reuse` asks for one.

    How the catalogue will write their definitions is found out on an empty temporary clone.
    Raises SchemaError when an expression cannot stand in an index.
    """
    drafts: list[tuple[Column, str, str, str, dict[str, sql.Composable]]] = []
    for column in columns:
        values = {
            "partition": column.partition_index_expression,
            "keys": column.keys,
            "pending": column.pending,
        }
        drafts.append((column, "pending", column.pending_index, "index/pending", values))
        if column.embedding.reuse:
            name = short_name(column.facts.name, column.embedding.column, "fingerprint")
            values = {"fingerprint": column.fingerprint}
            drafts.append((column, "fingerprint", name, "index/fingerprint", values))
    with clone(connection, columns) as temporary:
        for number, (column, _, _, file, values) in enumerate(drafts):
            create = sqlfiles.compose(
                file,
                name=sql.Identifier(f"embedding_pipeline_clone_{number}"),
                table=temporary,
                concurrently=sql.SQL(""),
                only=sql.SQL(""),
                **values,
            )
            build_on_clone(connection, column, temporary, create)
        row = connection.execute(
            b"SELECT $1::regclass::oid::bigint", [temporary.as_string(connection)]
        ).fetchone()
        assert row is not None
        found = {index.name: index.signature for index in existing_indexes(connection, row[0])}
    return [
        Wanted(
            column=column,
            suffix=suffix,
            name=name,
            file=file,
            values=values,
            marker=column.embedding.fingerprint_column,
            signature=found[f"embedding_pipeline_clone_{number}"],
        )
        for number, (column, suffix, name, file, values) in enumerate(drafts)
    ]


def same_meaning(connection: Connection, column: Column, stored: str) -> bool:
    """Whether a registered expected-expression is this column's, spelled differently.

    Postgres parses both on an empty clone and writes them in its own way. Where the registered
    one no longer parses, because a column was renamed, the pending index is looked at: Postgres
    has renamed the column in there too.
    """
    with clone(connection, [column]) as temporary:
        written = []
        for expression in (sql.SQL(stored), column.definition):
            try:
                with connection.transaction():
                    connection.execute(
                        sql.SQL("CREATE INDEX ON {} (({}))").format(temporary, expression)
                    )
            except psycopg.DatabaseError:
                break
            row = connection.execute(
                sqlfiles.query("catalogue/newest_expression"), [temporary.as_string(connection)]
            ).fetchone()
            assert row is not None
            written.append(row[0])
    if len(written) == 2:
        return bool(written[0] == written[1])
    wanted = wanted_queues(connection, [column])
    return any(
        index.valid and index.name == column.pending_index and wanted[0].matches(index)
        for index in existing_indexes(connection, column.facts.oid)
    )


def plan_index(
    connection: Connection,
    wanted: Wanted,
    existing: Sequence[Existing],
    *,
    when_built: Sequence[Statement] = (),
    replace: bool = False,
) -> list[Statement]:
    """The statements that bring an index into being; [] (and `when_built`) when it is right.

    With `replace`, one that is right is built anew beside the old and takes its place (not on a
    partitioned table). `when_built` goes in after the new index is complete and before an old one
    is dropped.
    Raises SchemaError when its name belongs to something else, or somebody is building it.
    """
    facts = wanted.column.facts
    spare = short_name(wanted.name, "new")
    for name in (wanted.name, spare):
        _refuse_foreign(connection, wanted, existing, name)
    mine = {index.name: index for index in existing if index.table_oid == facts.oid}
    current, other = mine.get(wanted.name), mine.get(spare)
    plan = _Steps(connection, wanted)
    for index in leftovers(wanted, existing):
        plan.drop(index, "left over from a REINDEX that failed")

    anew = replace and not facts.is_partitioned
    if current and current.valid and wanted.matches(current) and not anew:
        plan.steps.extend(when_built)
        if other:
            plan.drop(other, "left over from an earlier rebuild")
        return plan.steps

    if facts.is_partitioned:
        if other and wanted.matches(other):
            target = spare
        else:
            if other:
                plan.drop(other, plan.reason(other))
            target = wanted.name if current is None or wanted.matches(current) else spare
        _complete_partitioned(plan, existing, target)
    elif other and other.valid and wanted.matches(other):
        target = spare  # a rebuild was interrupted after its long part
    else:
        if other:
            plan.drop(other, plan.reason(other))
        if current and not current.valid:
            plan.drop(current, plan.reason(current))
            current = None
        target = spare if current else wanted.name
        plan.create(target, facts.schema, wanted.column.relation)

    plan.steps.extend(when_built)
    if target == spare:
        if current:
            plan.drop(current, "the new one takes its place" if anew else plan.reason(current))
        plan.rename(spare)
    return plan.steps


class _Steps:
    """Statements about one index, collected in order."""

    def __init__(self, connection: Connection, wanted: Wanted) -> None:
        self.connection = connection
        self.wanted = wanted
        self.steps: list[Statement] = []

    def add(
        self,
        text: sql.Composable,
        why: str,
        *,
        concurrently: bool = False,
        undo: sql.Composable | None = None,
        advice: str = "",
    ) -> None:
        column = self.wanted.column
        self.steps.append(
            Statement(
                sql=text.as_string(self.connection),
                why=why,
                concurrently=concurrently,
                table=column.table.table,
                table_oid=column.facts.oid,
                undo=undo.as_string(self.connection) if undo else None,
                advice=advice,
            )
        )

    def create(self, name: str, schema: str, table: sql.Composable) -> None:
        self.add(
            self.wanted.create(name, table, concurrently=True, only=False),
            f"build the {self.wanted.suffix} index {name} of {self.wanted.column}",
            concurrently=True,
            undo=sqlfiles.compose("index/undo", index=sql.Identifier(schema, name)),
            advice=_ADVICE.get(self.wanted.suffix, ""),
        )

    def create_only(self, name: str, table: sql.Composable) -> None:
        self.add(
            self.wanted.create(name, table, concurrently=False, only=True),
            f"declare the {self.wanted.suffix} index {name} of {self.wanted.column}, "
            "which its partitions' indexes complete",
        )

    def attach(self, schema: str, parent: str, child_schema: str, child: str) -> None:
        self.add(
            sqlfiles.compose(
                "index/attach",
                parent=sql.Identifier(schema, parent),
                index=sql.Identifier(child_schema, child),
            ),
            f"attach the partition's index {child} to {parent}",
        )

    def reason(self, index: Existing) -> str:
        if not index.valid and not index.partitioned:
            return "an earlier build of it failed and left it invalid"
        return "it has an earlier definition"

    def drop(self, index: Existing, why: str) -> None:
        concurrently = not index.partitioned
        self.add(
            sqlfiles.compose(
                "index/drop_concurrently" if concurrently else "index/drop", index=index.identifier
            ),
            f"drop the index {index.name}: {why}",
            concurrently=concurrently,
        )

    def rename(self, spare: str) -> None:
        self.add(
            sqlfiles.compose(
                "index/rename",
                index=sql.Identifier(self.wanted.column.facts.schema, spare),
                name=sql.Identifier(self.wanted.name),
            ),
            f"give the new index the name {self.wanted.name}",
        )


def leftovers(wanted: Wanted, existing: Sequence[Existing]) -> list[Existing]:
    """What a REINDEX CONCURRENTLY that failed has left of an index (PostgreSQL manual, REINDEX)."""
    return [
        index
        for index in existing
        if not index.valid
        and not index.partitioned
        and index.building_pid is None
        and wanted.matches(index)
        and re.search(r"_cc(new|old)\d*$", index.name)
    ]


def _complete_partitioned(plan: _Steps, existing: Sequence[Existing], target: str) -> None:
    """An index ONLY on the parent, one CONCURRENTLY on each partition, each attached."""
    wanted = plan.wanted
    facts = wanted.column.facts
    by_name = {(index.table_oid, index.name): index for index in existing}
    with plan.connection.cursor(row_factory=dict_row) as cursor:
        tree = cursor.execute(sqlfiles.query("catalogue/partitions"), [facts.oid]).fetchall()
    # table oid → (schema, name, oid) of the index that its partitions' indexes are attached to
    parents: dict[int, tuple[str, str, int | None]] = {}
    for node in tree:
        relation = sql.Identifier(node["schema"], node["name"])
        if node["oid"] == facts.oid:
            root = by_name.get((facts.oid, target))
            if root is None:
                plan.create_only(target, relation)
            parents[node["oid"]] = (facts.schema, target, root.oid if root else None)
            continue
        parent_schema, parent_name, parent_oid = parents[node["parent_oid"]]
        here = [index for index in existing if index.table_oid == node["oid"]]
        attached = [i for i in here if parent_oid is not None and i.parent_oid == parent_oid]
        if attached:
            parents[node["oid"]] = (attached[0].schema, attached[0].name, attached[0].oid)
            continue
        base = short_name(node["name"], wanted.column.embedding.column, wanted.suffix)
        name = next(
            name
            for name in (base, short_name(base, "new"))
            if (found := by_name.get((node["oid"], name))) is None or found.parent_oid is None
        )
        found = by_name.get((node["oid"], name))
        _refuse_foreign(plan.connection, wanted, existing, name, node["oid"], node["schema"])
        if found and not (wanted.matches(found) and (found.valid or found.partitioned)):
            plan.drop(found, plan.reason(found))
            found = None
        if found is None and node["is_leaf"]:
            plan.create(name, node["schema"], relation)
        elif found is None:
            plan.create_only(name, relation)
        plan.attach(parent_schema, parent_name, node["schema"], name)
        parents[node["oid"]] = (node["schema"], name, found.oid if found else None)


def _refuse_foreign(
    connection: Connection,
    wanted: Wanted,
    existing: Sequence[Existing],
    name: str,
    table_oid: int | None = None,
    schema: str | None = None,
) -> None:
    """SchemaError when an index's name belongs to something that is not an earlier one of ours."""
    table_oid = table_oid or wanted.column.facts.oid
    schema = schema or wanted.column.facts.schema
    found = next((i for i in existing if i.table_oid == table_oid and i.name == name), None)
    if found is not None and found.building_pid is not None:
        raise BusyError(
            f"{wanted.column}: its index {name} is being built by pid {found.building_pid}; "
            "wait for it to end and run this again"
        )
    if (
        found is not None
        and wanted.marker in found.columns
        # ours, perhaps of an earlier definition; but an HNSW index has never had another one
        and (wanted.suffix != "hnsw" or not found.valid or wanted.matches(found))
    ):
        return
    row = connection.execute(
        sqlfiles.query("catalogue/relation_by_name"), [schema, name]
    ).fetchone()
    if row is not None:
        raise SchemaError(
            f"{wanted.column}: its {wanted.suffix} index would be called {name}, but that is the "
            f"name of {row[0]}; rename that one, or the embedding column"
        )
