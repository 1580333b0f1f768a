"""Whether a bulk load writes with the HNSW index in place, or drops it to have it built afterwards.

Every row written to a column with an HNSW index enters its graph, which costs several times what
building the index from complete rows costs a row (`python -m benchmarks index`). But search must
not be left without the index that serves it: an index is dropped only where it has next to
nothing to find. One that was filled twice over in place is replaced later, under a second name,
by `indexes.build_hnsw`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import Report, quiet
from embedding_pipeline.store.indexes import drop_hnsw, index_state
from embedding_pipeline.store.pending import count_kinds, estimated_rows

BULK_ROWS = 1_000
"""Fewer rows are written in place whatever the index holds: dropping it would take as long."""
BREAK_EVEN_SHARE = 0.15
"""Of the table's rows. Measured (`python -m benchmarks index`): writing every row with the index in
place takes 4.4 times as long as writing without it and building it (10,000 × 1536; 5 times with
1,000), so that below 18 % (16 %) of the rows writing in place is cheaper."""
SERVED_SHARE = 0.1
"""With at least this share of rows that have a vector, an index is taken to serve search."""


@dataclass(frozen=True)
class LoadFacts:
    """What the decision depends on."""

    rows: int
    """Of the table, about."""
    to_write: int
    """Rows pending in the whole column, by whichever run they will be written."""
    without_vector: int
    """Of those, rows that have no vector yet."""
    index: Literal["missing", "ours", "of the user"]
    may_drop: bool = True
    """Whether our role owns the table."""


@dataclass(frozen=True)
class LoadPlan:
    """How the rows are written, and why, for the run's log."""

    how: Literal["load, then build", "in place", "drop, load, build"]
    why: str


def plan_load(facts: LoadFacts) -> LoadPlan:
    """The rule; touches nothing."""
    if facts.index == "missing":
        return LoadPlan("load, then build", "there is no index yet")
    if facts.to_write < BULK_ROWS:
        return LoadPlan("in place", f"{facts.to_write:,} rows are few")
    rows = max(facts.rows, facts.to_write)
    served = rows - facts.without_vector
    if served >= SERVED_SHARE * rows:
        return LoadPlan("in place", f"search is served from it: {served:,} rows have a vector")
    if facts.to_write < BREAK_EVEN_SHARE * rows:
        return LoadPlan("in place", f"{facts.to_write:,} of {rows:,} rows are few")
    if facts.index == "of the user":
        return LoadPlan(
            "in place",
            "it is not one that this project made; without it the load would be several times "
            "quicker: drop it, and materialise the index afterwards",
        )
    if not facts.may_drop:
        return LoadPlan(
            "in place",
            "only the table's owner may drop it; without it the load would be several times "
            "quicker",
        )
    return LoadPlan(
        "drop, load, build",
        f"{served:,} of {rows:,} rows have a vector, so that search finds next to nothing in it",
    )


def load_facts(connection: "psycopg.Connection[Any]", column: Column) -> LoadFacts:
    """The facts as the database has them now, from the catalogue and the pending index."""
    state = index_state(connection, column)
    index: Literal["missing", "ours", "of the user"] = "missing"
    if state.state != "missing":
        index = "ours" if state.name == column.hnsw_index else "of the user"
    kinds = count_kinds(connection, column)
    return LoadFacts(
        rows=estimated_rows(connection, column),
        to_write=kinds.pending,
        without_vector=kinds.missing + kinds.quarantined,
        index=index,
        may_drop=column.facts.owned,
    )


def prepare_load(
    connection: "psycopg.Connection[Any]", column: Column, rows: int, *, report: Report = quiet
) -> LoadPlan | None:
    """Before a run writes: drop the index where the rule says so. None for a run of few rows.

    `rows` is what the run expects to write. A drop that cannot be had now (somebody holds the
    table) is reported and left: the rows are written in place then.
    """
    if rows < BULK_ROWS:
        return None
    plan = plan_load(load_facts(connection, column))
    if plan.how == "drop, load, build":
        try:
            drop_hnsw(connection, column, report=report, patience=5.0)
        except SchemaError as error:
            report(f"{column}: its index stays, so writing takes longer: {error}")
            return LoadPlan("in place", "it could not be dropped")
        report(f"{column}: the index is built again once the rows are in: {plan.why}")
    elif plan.how == "in place":
        report(f"{column}: rows are written with the index in place: {plan.why}")
    return plan
