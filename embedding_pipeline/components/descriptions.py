"""What the UI says of a table's assets, as Markdown for somebody who sees them first. Pure."""

from embedding_pipeline.spec import (
    EmbeddingSpec,
    HashPartitions,
    MonthPartitions,
    TableSpec,
)


def source_description(table: TableSpec) -> str:
    """The table itself."""
    given = f"{table.description.strip()}\n\n" if table.description else ""
    columns = ", ".join(f"`{embedding.column}`" for embedding in table.embeddings)
    return (
        f"{given}The source table `{table.table}`. Its rows belong to its own application; this "
        f"project writes nothing but the embedding columns ({columns}) and a fingerprint beside "
        "each.\n\n"
        "**Observe** counts its rows and how many of them wait for a vector. Every embedding run "
        "notes the same, so that `row_count` and the `…_pending` figures can be plotted over time."
    )


def embedding_description(table: TableSpec, embedding: EmbeddingSpec) -> str:
    """One embedding column."""
    eligible = f", where `{_line(table.eligible)}`" if table.eligible else ""
    return (
        f"`{table.table}.{embedding.column}`: for every row one vector of {embedding.dimensions} "
        f"dimensions, made of `{_line(table.text)}`{eligible} by the model `{embedding.model}` "
        f"(provider `{embedding.provider}`).\n\n"
        "**Materialising** embeds *pending* rows only: new ones, those whose text was edited, and "
        "those whose vector was removed. Rows that are up to date are neither read nor sent, so "
        "it is safe at any time and costs nothing twice; what a stopped run had finished is "
        f"kept.\n\n**Partitions**: {_partitions(table)}. Select some and click *Materialize*, or "
        "let the table's sensor ask for those that have pending rows.\n\n"
        "**Figures** of each materialisation: `embedded` rows were sent and written, `reused` "
        "ones got a vector that exists already, `cleared` ones have no text any more; `superseded` "
        "rows were edited meanwhile and `locked` ones were held by somebody, so both stay pending; "
        "`quarantined` ones the provider refused. `remaining` is what the partition still has to "
        "do. Those of the whole run are `pending` (of the column), `rows_per_second`, `run_tokens` "
        "and `run_cost_usd`: *Plots* → *Events* shows them over time."
    )


def index_description(table: TableSpec, embedding: EmbeddingSpec) -> str:
    """The HNSW index of one embedding column."""
    return (
        f"The HNSW index (cosine distance) on `{table.table}.{embedding.column}`: what makes a "
        "search by meaning read a few rows instead of the whole table.\n\n"
        "**Materialising** builds it `CONCURRENTLY` when it is missing or invalid, and leaves a "
        "valid one alone. Readers and writers are not kept waiting. It comes after the rows: "
        "loading them first and building then is several times cheaper. It also replaces an "
        "index that is mostly dead rows, rebuilds a bloated pending index and runs `VACUUM` after "
        "many writes. A paused table is left alone."
    )


def quality_description(table: TableSpec) -> str:
    """The evaluation of all of a table's columns."""
    if table.golden_set is None:
        return (
            f"How well search finds what it should in `{table.table}`. Nothing can be measured "
            "yet: name a golden set (questions with the rows that should be found) under "
            "`golden_set:` in the table's YAML."
        )
    return (
        f"How well search finds what it should in `{table.table}`: the questions of the golden "
        f"set (`{table.golden_set}`) are asked of every embedding column, by an exact search and "
        "through the index.\n\n"
        "**The report** (*Show Markdown*) has each column beside its baseline, MRR@5 over time, "
        "and the questions that went worst with what was found instead. MRR@5 is the mean of 1 / "
        "rank of the first right row among the first five (1 is perfect), hit@1 the share of "
        "questions whose first row is right, p95 the time within which 95 % of searches ended. "
        "*Plots* shows each over time.\n\n"
        "**Materialising** costs nothing twice: the vectors of the questions are kept. The "
        "table's sensor asks for it when a column is complete and none is being filled."
    )


def check_descriptions(embedding: EmbeddingSpec) -> dict[str, str]:
    """Check → what it asks, when it fails, and what to do then."""
    against = (
        f" and at least {embedding.baseline_ratio:g} × that of `{embedding.baseline}`"
        if embedding.baseline
        else ""
    )
    return {
        "coverage": (
            "Every eligible row has the vector that its text calls for. Missing and stale rows "
            "are a warning at first, since a writer or a run explains them, and an error once "
            f"they have been pending for {embedding.max_pending_minutes:g} minutes; so are "
            f"quarantined rows above {embedding.max_quarantined_share:.1%}.\n\n"
            "**When it fails**: the table's sensor says at each tick why it asked for nothing, "
            "and the last failed run has the provider's words. Then materialise the partitions "
            "that are left; *embedding-pipeline retry TABLE COLUMN --list* shows refused rows."
        ),
        "vectors_valid": (
            "No vector is all zeros (a cosine index leaves those out silently), and texts that "
            "differ have vectors that differ.\n\n"
            "**When it fails**: the metadata names keys. Set those vectors to NULL, materialise, "
            "and ask what the provider did."
        ),
        "golden_mrr": (
            f"MRR@5 on the golden set is at least {embedding.mrr_floor:g}{against}. MRR@5 is the "
            "mean of 1 / rank of the first right row among the first five; 1 is perfect.\n\n"
            "**When it fails**: the report of `retrieval_quality` has the questions that went "
            "worst and what was found instead. Many at once mean wrong vectors."
        ),
        "index_recall": (
            f"The HNSW index finds at least {embedding.recall_floor:.0%} of what an exact search "
            "finds: an index answers fast because it does not look everywhere.\n\n"
            f"**When it fails**: materialise `{embedding.column}_index`, which builds what is "
            "missing or invalid, or raise `hnsw.ef_search`."
        ),
    }


def _partitions(table: TableSpec) -> str:
    partitions = table.partitions
    if isinstance(partitions, HashPartitions):
        return f"{partitions.buckets} buckets of about the same size, by a hash of the key"
    if isinstance(partitions, MonthPartitions):
        return f"a month of `{partitions.column}` (UTC) each; new months appear by themselves"
    return f"a value of `{partitions.column}` each; new values appear by themselves"


def _line(expression: str) -> str:
    """SQL as it fits between back-ticks on one line."""
    return " ".join(expression.replace("`", "'").split())
