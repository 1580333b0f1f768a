"""Partitioned embedding assets, index assets and the evaluation asset of one table."""

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from embedding_pipeline.brakes import paused
from embedding_pipeline.components import descriptions, names
from embedding_pipeline.components.processes import tag_process
from embedding_pipeline.components.table_metadata import (
    Metadata,
    column_lineage,
    count_rows,
    embedding_schema,
    read_columns,
    table_figures,
)
from embedding_pipeline.errors import LeaseError, PipelineError
from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect, database_url
from embedding_pipeline.store.pending import count_kinds

if TYPE_CHECKING:
    # numpy and what speaks to providers: loading the definitions must not wait for them
    from embedding_pipeline.backfill import Options, Outcome, Progress
    from embedding_pipeline.embed_column import ColumnRun

LEASE_HELD = "held_by_other_runs"
"""In a failure's metadata: live runs hold all the partitions, so waiting is the answer."""

AUTOMATIC = {"dagster/sensor_name", "dagster/schedule_name"}
"""Tags of runs that no person is waiting for."""

HELD_BY = "held_by"
"""In a materialisation's metadata: the brake (`pause`, `daily_cost_cap`) that stopped the run."""

RUN_WRITTEN = "run_written"
"""In a failure's metadata: rows that the run had written by then, whatever their partition."""

LOG_SECONDS = 5.0
"""How often a run says in its log where it stands."""

LISTENERS: "list[Callable[[Progress], None]]" = []
"""Who else follows the progress of runs in this process: the command line's bars."""

LINE_LISTENERS: "list[Callable[[str], None]]" = []
"""Who else hears what the index builds of this process say: the command line."""


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


def source_asset(table: TableSpec) -> dg.AssetsDefinition:
    """The table itself, as the origin of the lineage; observing it counts its rows."""
    key = names.source_key(table)

    @dg.multi_observable_source_asset(  # type: ignore[untyped-decorator]
        name=f"observe_{table.asset_name}",
        specs=[
            dg.AssetSpec(
                key,
                group_name=table.asset_name,
                description=descriptions.source_description(table),
                kinds={"postgres", "table"},
                owners=table.owners,
                metadata={"dagster/table_name": table.table, **readme()},
            )
        ],
    )
    def observe(context: dg.AssetExecutionContext) -> dg.ObserveResult:
        tag_process(context.instance, context.run)
        try:
            with connect() as connection:
                columns = bind_columns(connection, table)
                rows = count_rows(connection, columns[0])
                metadata = table_figures(connection, columns, rows)
        except PipelineError as error:
            raise failure(error) from None
        return dg.ObserveResult(asset_key=key, metadata=metadata)

    asset: dg.AssetsDefinition = observe
    return asset


def readme() -> dict[str, dg.MetadataValue]:
    """A link to the README, beside Dagster's own to the YAML, where the project is a clone."""
    path = PROJECT_ROOT / "README.md"
    if not path.is_file():
        return {}
    reference = dg.LocalFileCodeReference(file_path=str(path), line_number=1, label="README.md")
    return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[reference])}


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
        # another recipe is another version of the column: "code version" in the UI
        code_version=hashlib.md5(embedding.recipe.encode(), usedforsecurity=False).hexdigest()[:8],
        metadata={
            "dagster/table_name": table.table,
            "dimensions": embedding.dimensions,
            "model": embedding.model,
            "provider": embedding.provider,
            **readme(),
        },
        description=descriptions.embedding_description(table, embedding),
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
                run_id=context.run.run_id,
                report=context.log.info,
                on_progress=progress,
            )
        except BackfillError as error:
            _log_finished(context, key, error.outcome)
            raise dg.Failure(
                description=f"{error}\n\nWhat was finished is kept; run it again to go on.",
                metadata={
                    RUN_WRITTEN: error.outcome.total.written,
                    "quarantined": error.outcome.total.quarantined,
                    "truncated": error.outcome.total.truncated,
                    **_run_metadata(error.outcome),
                },
                allow_retries=True,
            ) from error
        except LeaseError as error:
            if AUTOMATIC & context.run.tags.keys():
                # asked for in the moment in which another run took the rows, which now gets them
                for partition in partitions:
                    context.add_asset_metadata({"stopped": str(error)}, partition_key=partition)
                context.log.info(str(error))
                return
            raise dg.Failure(str(error), metadata={LEASE_HELD: True}, allow_retries=False) from None
        except PipelineError as error:
            raise failure(error) from None
        with connect() as connection:
            rows = count_rows(connection, column)
            read = read_columns(connection, column)
            pending = count_kinds(connection, column).pending
            seen = table_figures(connection, [column], rows)
        for partition in partitions:
            context.add_asset_metadata(
                {**_partition_metadata(partition, run, rows), "pending": pending},
                partition_key=partition,
            )
        # on every partition, since the UI reads them from whichever Dagster recorded last
        context.add_asset_metadata(
            {
                "dagster/column_schema": embedding_schema(column, read),
                "dagster/column_lineage": column_lineage(column, read),
            }
        )
        context.log_event(dg.AssetObservation(names.source_key(table), metadata=seen))
        context.log.info("%s: %s", column, summary(run, pending))
        if run.outcome.stopped:
            context.log.warning("%s stopped early: %s", column, run.outcome.stopped)

    return embed


def summary(run: "ColumnRun", pending: int) -> str:
    """A run in a sentence or two for its log; `pending` is the whole column's."""
    outcome, total = run.outcome, run.outcome.total
    left = f"{pending:,} rows of the column are pending" if pending else "nothing is pending now"
    if not total.read:
        return f"every row had its vector already, nothing was sent; {left}"
    notes = [
        f"{count:,} {what}"
        for count, what in (
            (total.reused, "took a vector that exists"),
            (total.cleared, "lost theirs, having no text any more"),
            (total.superseded, "were edited meanwhile"),
            (total.locked, "were held by somebody"),
            (total.quarantined, "were refused and are quarantined"),
            (total.truncated, "were cut to what the model takes"),
        )
        if count
    ]
    return (
        f"{total.embedded:,} rows embedded in {outcome.seconds:.1f} s with {outcome.tokens:,} "
        f"tokens for ${outcome.cost:.4f} (forecast ${run.forecast:.4f})"
        f"{'; ' if notes else ''}{', '.join(notes)}; {left}"
    )


def _partition_metadata(partition: str, run: "ColumnRun", rows: dict[str, int] | None) -> Metadata:
    """One partition's figures. Tokens and cost of shared requests are split by rows embedded,
    so that summing over partitions gives the run's."""
    from embedding_pipeline.backfill import Counts

    counts = run.outcome.partitions.get(partition, Counts())
    total = run.outcome.total.embedded
    share = counts.embedded / total if total else 0.0
    metadata: Metadata = {
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
    if rows is not None:
        metadata["dagster/partition_row_count"] = rows.get(partition, 0)
        metadata["dagster/row_count"] = sum(rows.values())
    if partition in run.held:
        metadata["held_by_run"] = run.held[partition].run_id or "outside Dagster"
    return metadata


def _run_metadata(outcome: "Outcome") -> Metadata:
    """The whole run's figures, the same on each of its partitions: what plots over time.

    Plotted by event, a run's partitions lie on one another; figures that were split among them
    would make a saw of every run.
    """
    metadata: Metadata = {
        "rows_per_second": round(outcome.total.written / outcome.seconds, 1)
        if outcome.seconds
        else 0.0,
        "run_seconds": round(outcome.seconds, 3),
        "run_tokens": outcome.tokens,
        "run_cost_usd": round(outcome.cost, 9),
        "run_requests": outcome.requests,
        "run_throttled": outcome.throttled,
        "run_retried": outcome.retried,
    }
    if outcome.stopped:
        metadata["stopped"] = outcome.stopped
    if outcome.held:
        metadata[HELD_BY] = outcome.held.by
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
        metadata={"dagster/table_name": table.table, **readme()},
        description=descriptions.index_description(table, embedding),
    )
    def build(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        from embedding_pipeline.store.indexes import build_hnsw
        from embedding_pipeline.store.maintenance import maintain

        def say(line: str) -> None:
            context.log.info(line)
            for listener in LINE_LISTENERS:
                listener(line)

        tag_process(context.instance, context.run)
        try:
            column = bind_column(table, embedding.column)
            with connect() as connection:
                held = paused(connection, column)
                if held is not None:
                    context.log.warning("%s: its index is left alone: %s", column, held)
                    return dg.MaterializeResult(metadata={"built": False, "stopped": str(held)})
                report = build_hnsw(connection, column, report=say)
                maintained = maintain(connection, column, report=say)
        except PipelineError as error:
            raise failure(error) from None
        return dg.MaterializeResult(
            metadata={**index_metadata(report), **index_metadata(maintained)}
        )

    return build


def index_metadata(report: object) -> dict[str, int | float | str | bool]:
    """The plain values of a report on an index."""
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
        metadata={"dagster/table_name": table.table, **readme()},
        description=descriptions.quality_description(table),
    )
    def evaluate(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        from embedding_pipeline.components.quality import evaluate_table

        tag_process(context.instance, context.run)
        try:
            return dg.MaterializeResult(metadata=evaluate_table(file, context.run.run_id))
        except PipelineError as error:
            raise failure(error) from None

    return evaluate
