"""What an evaluation found: plain values, as they are stored, compared and reported."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from embedding_pipeline.evaluation.keys import Key


@dataclass(frozen=True)
class Found:
    """A row that a query found."""

    key: Key
    score: float
    """1 - cosine distance."""
    snippet: str


@dataclass(frozen=True)
class QueryResult:
    """One golden query against one column."""

    query: str
    tenant: str | None
    expected: tuple[Key, ...]
    """The keys that exist, as the database writes them; those that do not are in `missing`."""
    missing: tuple[Key, ...]
    """Expected keys without a row (or, for a query with a tenant, without one of the tenant's)."""
    pending: tuple[Key, ...]
    """Expected rows that exist but had no current vector: a miss that pending rows explain."""
    rank: int | None
    """Rank of the first expected row in the exact top 10."""
    reciprocal_rank: float | None
    """At 5, exact; None when no expected row exists any more: the query was not scored."""
    hit: float | None
    ndcg: float | None
    index_rank: int | None
    """The same through the HNSW index; None also where there is no index."""
    index_reciprocal_rank: float | None
    index_recall: float | None
    found: tuple[Found, ...]
    """The first rows of the exact ranking; the first one alone where it is an expected one."""

    @property
    def scored(self) -> bool:
        return self.reciprocal_rank is not None

    @property
    def name(self) -> tuple[str, str | None]:
        """What the query is known by in its golden set."""
        return self.query, self.tenant

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "QueryResult":
        keys = {
            name: tuple(tuple(key) for key in value[name])
            for name in ("expected", "missing", "pending")
        }
        found = tuple(
            Found(tuple(each["key"]), float(each["score"]), each["snippet"])
            for each in value["found"]
        )
        return cls(**{**_known(cls, value), **keys, "found": found})


@dataclass(frozen=True)
class IndexRecall:
    """HNSW against exact search: the share of the exact top k that the index found, too."""

    recall: float | None
    """Mean over the queries; None when there was no usable index or nothing to look for."""
    queries: int
    index: str | None
    """Name of the index that was used."""
    reason: str | None
    """Why `recall` is None."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one column against one golden set: a row of `golden_set_result`."""

    table_schema: str
    table_name: str
    column_name: str
    model: str
    evaluated_at: datetime
    run_id: str | None
    queries: int
    """Queries of the golden set, those in `missing_expected` included."""
    missing_expected: int
    """Queries none of whose expected rows exist any more; left out of every mean."""
    mrr_at_5: float | None
    """Exact search; None when no query could be scored."""
    hit_at_1: float | None
    ndcg_at_10: float | None
    p50_ms: float | None
    """Milliseconds of one exact top-10 query, warm, as the client sees it."""
    p95_ms: float | None
    index_mrr_at_5: float | None
    """Through the HNSW index; None where there is no valid one (see `index_reason`)."""
    index_recall: float | None
    index_p50_ms: float | None
    index_p95_ms: float | None
    coverage: float | None
    """Share of eligible rows with a current vector at that time; None when none is eligible."""
    # the rest is stored in `details`
    recipe: str
    golden_set_hash: str
    partly_missing: int
    """Queries scored on the expected rows that still exist, others being gone."""
    index: str | None
    index_reason: str | None
    ef_search: int
    results: tuple[QueryResult, ...]
    # fields that later versions add need a default: stored evaluations lack them
    queries_embedded: int = 0
    """Queries whose vectors the cache lacked."""
    requests: int = 0
    """Embedding requests that this took."""

    @property
    def scored(self) -> int:
        """Queries that the means are over."""
        return self.queries - self.missing_expected

    @property
    def measured_index(self) -> IndexRecall:
        """The index's figures, as `verdict.index_recall_verdict` takes them."""
        return IndexRecall(self.index_recall, self.scored, self.index, self.index_reason)

    def details(self) -> dict[str, Any]:
        """What has no column of its own in `golden_set_result`, as JSON values."""
        return {
            "recipe": self.recipe,
            "golden_set_hash": self.golden_set_hash,
            "partly_missing": self.partly_missing,
            "index": self.index,
            "index_reason": self.index_reason,
            "ef_search": self.ef_search,
            "queries_embedded": self.queries_embedded,
            "requests": self.requests,
            "results": [asdict(result) for result in self.results],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Evaluation":
        """An evaluation from a row of `golden_set_result`, its `details` parsed."""
        details = row["details"]
        results = tuple(QueryResult.from_json(value) for value in details["results"])
        columns = {name: value for name, value in row.items() if name != "details"}
        return cls(**{**columns, **_known(cls, details), "results": results})


def _known(type_: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the dataclass has a field for: another version may have stored more."""
    names = {each.name for each in fields(type_)}
    return {name: value for name, value in values.items() if name in names}
