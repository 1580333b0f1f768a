"""Partitioned embedding assets, index assets and the evaluation asset of one table."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from embedding_pipeline.components import names
from embedding_pipeline.components.processes import tag_process
from embedding_pipeline.errors import LeaseError, PipelineError
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect, database_url
from embedding_pipeline.store.pending import estimated_rows, partitions_in_data

if TYPE_CHECKING:
    # numpy and what speaks to providers: loading the definitions must not wait for them
    from embedding_pipeline.backfill import Options, Outcome, Progress
    from embedding_pipeline.embed_column import ColumnRun

LEASE_HELD = "held_by_other_runs"
"""In a failure's metadata: live runs hold all the partitions, so waiting is the answer."""

LOG_SECONDS = 5.0
"""How often a run says in its log where it stands."""

LISTENERS: "list[Callable[[Progress], None]]" = []
"""Who else follows the progress of runs in this process: the command line's bars."""

COUNTED_ROWS = 200_000
"""Up to this size a run counts each partition's rows for `dagster/row_count`: a full scan."""


class EmbedConfig(dg.Config):
    """What one run may do; the defaults come from the table's YAML."""

    limit: int | None = Field(
        None, ge=1, description="Embed at most this many rows, then stop; the rest stays pending."
    )
    batch_size: int | None = Field(
        None, ge=1, le=2048, description="Texts in one request to the provider."
    )
    concurrency: int | None = Field(
        None, ge=1, le=256, description="Requests in flight at once, below the provider's ceiling."
    )
    max_cost: float | None = Field(
        None, gt=0, description="US dollars; the run stops before it would pass them."
    )

    def options(self, table: TableSpec, embedding: EmbeddingSpec) -> "Options":
        from embedding_pipeline.backfill import Options

        return Options(
            limit=min(self.limit or table.rows_per_run, table.rows_per_run),
            batch_size=self.batch_size or embedding.batch_size,
            concurrency=self.concurrency or embedding.concurrency,
            max_cost=self.max_cost or embedding.max_cost,
        )


def bind_column(table: TableSpec, column: str) -> Column:
    """The column as the database has it now.

    IdentityError when the YAML asks for another recipe than the one that fills it.
    """
    from embedding_pipeline.identity import check_identity

    with connect() as connection:
        columns = bind_columns(connection, table)
        found = next(bound for bound in columns if bound.embedding.column == column)
        check_identity(connection, found)
    return found


def failure(error: PipelineError) -> dg.Failure:
    """A user's error as Dagster shows it best: the message first, no retry of its own."""
    return dg.Failure(description=str(error), allow_retries=False)


def source_asset(table: TableSpec) -> dg.AssetSpec:
    """The table itself, as the origin of the lineage."""
    return dg.AssetSpec(
        names.source_key(table),
        group_name=table.asset_name,
        description=table.description
        or f"The source table `{table.table}`: its rows and texts belong to its own application.",
        kinds={"postgres", "table"},
        owners=table.owners,
        metadata={"dagster/table_name": table.table},
    )


def embedding_asset(table: TableSpec, embedding: EmbeddingSpec) -> dg.AssetsDefinition:
    """The asset `[table, column]`, one partition for each of the table's partitions."""
    key = names.column_key(table, embedding)

    @dg.asset(
        key=key,
        deps=[names.source_key(table)],
        partitions_def=names.partitions_definition(table),
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=table.asset_name,
        kinds={"postgres", "pgvector"},
        owners=table.owners,
        pool=f"provider_{embedding.provider}",
        tags={"provider": embedding.provider},
        metadata={
            "dagster/table_name": table.table,
            "dimensions": embedding.dimensions,
            "model": embedding.model,
            "provider": embedding.provider,
        },
        description=(
            f"`{table.table}.{embedding.column}`: {embedding.dimensions}-dim vectors by "
            f"`{embedding.model}` (provider `{embedding.provider}`).\n\n"
            "Materialising a partition embeds its pending rows only: those whose stored "
            "fingerprint is not the one that their text calls for now. Rows that are up to date "
            "are neither read nor sent. Safe to run at any time, and to run again."
        ),
    )
    def embed(context: dg.AssetExecutionContext, config: EmbedConfig) -> None:
        from embedding_pipeline.backfill import BackfillError
        from embedding_pipeline.embed_column import embed_column

        partitions = list(context.partition_keys)
        if not partitions:
            raise dg.Failure(
                "The partition range is empty: its start lies after its end in the order in which "
                "the partitions were made. Select the partitions in the order of the list.",
                allow_retries=False,
            )
        order = {key: n for n, key in enumerate(names.known_partitions(context.instance, table))}
        partitions.sort(key=lambda partition: order.get(partition, 0))
        url = database_url()

        logged = time.monotonic()

        def progress(at: "Progress") -> None:
            nonlocal logged
            for listener in LISTENERS:
                listener(at)
            if at.remaining == 0 or time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                context.log.info("%s.%s: %s", table.table, embedding.column, at)

        try:
            column = bind_column(table, embedding.column)
            run = embed_column(
                url,
                column,
                partitions,
                config.options(table, embedding),
                run_id=context.run_id,
                report=context.log.info,
                on_progress=progress,
            )
        except BackfillError as error:
            _log_finished(context, key, error.outcome)
            raise dg.Failure(
                description=f"{error}\n\nWhat was finished is kept; run it again to go on.",
                metadata=_run_metadata(error.outcome),
                allow_retries=True,
            ) from error
        except LeaseError as error:
            raise dg.Failure(str(error), metadata={LEASE_HELD: True}, allow_retries=False) from None
        except PipelineError as error:
            raise failure(error) from None
        rows = _rows_by_partition(column)
        for partition in partitions:
            context.add_asset_metadata(
                _partition_metadata(partition, run, rows), partition_key=partition
            )
        if run.outcome.stopped:
            context.log.warning("%s stopped early: %s", column, run.outcome.stopped)

    return embed


def _rows_by_partition(column: Column) -> dict[str, int]:
    with connect() as connection:
        if estimated_rows(connection, column) > COUNTED_ROWS:
            return {}
        return dict(partitions_in_data(connection, column))


def _partition_metadata(
    partition: str, run: "ColumnRun", rows: dict[str, int]
) -> dict[str, int | float | str | dg.MetadataValue]:
    """One partition's figures. Tokens and cost of shared requests are split by rows embedded,
    so that summing over partitions gives the run's."""
    from embedding_pipeline.backfill import Counts

    counts = run.outcome.partitions.get(partition, Counts())
    total = run.outcome.total.embedded
    share = counts.embedded / total if total else 0.0
    metadata: dict[str, int | float | str | dg.MetadataValue] = {
        "embedded": counts.embedded,
        "reused": counts.reused,
        "cleared": counts.cleared,
        "superseded": counts.superseded,
        "locked": counts.locked,
        "quarantined": counts.quarantined,
        "truncated": counts.truncated,
        "remaining": run.remaining.get(partition, 0),
        "tokens": round(run.outcome.tokens * share),
        "cost_usd": run.outcome.cost * share,
        "forecast_usd": run.forecast * share,
        **_run_metadata(run.outcome),
    }
    if partition in rows:
        metadata["dagster/partition_row_count"] = rows[partition]
    if partition in run.held:
        metadata["held_by_run"] = run.held[partition].run_id or "outside Dagster"
    return metadata


def _run_metadata(outcome: "Outcome") -> dict[str, int | float | str | dg.MetadataValue]:
    metadata: dict[str, int | float | str | dg.MetadataValue] = {
        "rows_per_second": round(outcome.total.written / outcome.seconds, 1)
        if outcome.seconds
        else 0.0,
        "run_seconds": round(outcome.seconds, 3),
        "run_requests": outcome.requests,
        "run_throttled": outcome.throttled,
        "run_retried": outcome.retried,
    }
    if outcome.stopped:
        metadata["stopped"] = outcome.stopped
    return metadata


def _log_finished(context: dg.AssetExecutionContext, key: dg.AssetKey, outcome: "Outcome") -> None:
    """Record partitions that a failed run did complete: they need not be run again."""
    for partition, counts in outcome.partitions.items():
        if counts.read and counts.read == counts.written:
            context.log_event(
                dg.AssetMaterialization(
                    key,
                    partition=partition,
                    metadata={"embedded": counts.embedded, "reused": counts.reused},
                )
            )


def index_asset(table: TableSpec, embedding: EmbeddingSpec) -> dg.AssetsDefinition:
    """The asset `[table, column_index]`: an HNSW index, built once the rows are in."""

    @dg.asset(
        key=names.index_key(table, embedding),
        deps=[names.column_key(table, embedding)],
        group_name=table.asset_name,
        kinds={"postgres", "hnsw"},
        owners=table.owners,
        description=(
            f"The HNSW index (cosine) on `{table.table}.{embedding.column}`. Materialising it "
            "builds the index CONCURRENTLY when it is missing or invalid and leaves a valid one "
            "alone."
        ),
    )
    def build(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        from embedding_pipeline.store.indexes import build_hnsw

        tag_process(context.instance, context.run)
        try:
            column = bind_column(table, embedding.column)
            with connect() as connection:
                report = build_hnsw(connection, column, report=context.log.info)
        except PipelineError as error:
            raise failure(error) from None
        return dg.MaterializeResult(metadata=index_metadata(report))

    return build


def index_metadata(report: object) -> dict[str, int | float | str | bool]:
    """The plain values of an index report."""
    return {
        name: value
        for name, value in vars(report).items()
        if isinstance(value, int | float | str | bool)
    }


def quality_asset(file: TableFile) -> dg.AssetsDefinition:
    """The asset `[table, retrieval_quality]`: the golden set evaluated on every column."""
    table = file.spec

    @dg.asset(
        key=names.quality_key(table),
        deps=[
            *(names.column_key(table, embedding) for embedding in table.embeddings),
            *(names.index_key(table, embedding) for embedding in table.embeddings),
        ],
        group_name=table.asset_name,
        kinds={"postgres", "evaluation"},
        owners=table.owners,
        description=(
            f"How well search finds what it should in `{table.table}`: the golden set's queries "
            "run against every embedding column, exactly and through the index. Query vectors "
            "are cached, so evaluating again costs nothing."
        ),
    )
    def evaluate(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        from embedding_pipeline.components.quality import evaluate_table

        tag_process(context.instance, context.run)
        try:
            return dg.MaterializeResult(metadata=evaluate_table(file, context.run_id))
        except PipelineError as error:
            raise failure(error) from None

    return evaluate
