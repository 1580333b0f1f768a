"""Which endpoint embeds a table's queries (EMBEDDING_MODE), and which column is searched then.

The column follows from the model that answered: a query's vector says nothing in a column that
another model has filled.
"""

from collections.abc import Mapping

from embedding_pipeline.embedders import Embedder, Endpoint, create_embedder, load_endpoints
from embedding_pipeline.embedders.fallback import FallbackEmbedder
from embedding_pipeline.embedders.port import Dialect
from embedding_pipeline.errors import SettingsError
from embedding_pipeline.settings import EmbeddingMode, Settings
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.store.endpoint_state import StateRecorder

DIALECTS: dict[EmbeddingMode, tuple[Dialect, ...]] = {
    EmbeddingMode.SERVER: ("tei",),
    EmbeddingMode.OPENAI: ("openai",),
    EmbeddingMode.FALLBACK: ("tei", "openai"),
}


def make_query_embedder(
    settings: Settings,
    table: TableSpec,
    *,
    active: str | None = None,
    record_in: str | None = None,
) -> FallbackEmbedder:
    """What embeds a table's queries as EMBEDDING_MODE says; nothing is contacted yet.

    `server` asks the endpoint of the table's TEI column, `openai` that of its OpenAI-dialect
    column, `fallback` the first and, while it is down, the second. Where several columns would
    do, `active` wins, then one of the provider that the mode is named for, then the YAML's first.
    Each answer (and `state`) names endpoint, model and column to search. With a database's address
    in `record_in` other processes can read the state too (`store.endpoint_state`).

    The prefix of documents is left off. Raises SettingsError where the mode is not possible.
    """
    endpoints = load_endpoints(settings)
    mode = settings.embedding_mode
    chosen = [_choose(mode, dialect, table, endpoints, active) for dialect in DIALECTS[mode]]
    embedders = [_embedder(endpoints[each.provider], each) for each in chosen]
    return FallbackEmbedder(
        embedders[0],
        embedders[1] if len(embedders) > 1 else None,
        columns=(chosen[0].column, chosen[1].column if len(chosen) > 1 else None),
        on_state=StateRecorder(record_in, table, mode) if record_in else lambda _: None,
    )


def _choose(
    mode: EmbeddingMode,
    dialect: Dialect,
    table: TableSpec,
    endpoints: Mapping[str, Endpoint],
    active: str | None,
) -> EmbeddingSpec:
    speaks = {
        each.column: endpoints[each.provider].dialect
        for each in table.embeddings
        if each.provider in endpoints
    }
    fitting = [each for each in table.embeddings if speaks.get(each.column) == dialect]
    if not fitting:
        there = ", ".join(
            f"{each.column} is filled by {each.provider}" for each in table.embeddings
        )
        kind = "a TEI" if dialect == "tei" else "an OpenAI-dialect"
        possible = " or ".join(
            f"EMBEDDING_MODE={other.value}"
            for other, dialects in DIALECTS.items()
            if set(dialects) <= set(speaks.values())
        )
        raise SettingsError(
            f"EMBEDDING_MODE={mode.value} embeds queries with {kind} endpoint, but no column of "
            f"{table.table} has one ({there}); set {possible}, or add such a column"
        )
    fitting.sort(key=lambda each: (each.column != active, each.provider != dialect))
    best = fitting[0]
    if (problem := endpoints[best.provider].unusable) is not None:
        raise SettingsError(
            f"EMBEDDING_MODE={mode.value} embeds queries of {table.table} for {best.column}, whose "
            f"provider {best.provider} cannot be used: {problem}"
        )
    return best


def _embedder(endpoint: Endpoint, embedding: EmbeddingSpec) -> Embedder:
    return create_embedder(
        endpoint, embedding.model, embedding.dimensions, overlong=embedding.overlong
    )
