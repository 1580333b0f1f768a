"""The jobs `pause_embedding` and `resume_embedding`: the brakes, from the UI."""

import dagster as dg
from pydantic import Field

from embedding_pipeline.columns import select
from embedding_pipeline.components import names
from embedding_pipeline.components.assets import failure
from embedding_pipeline.components.processes import tag_process
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.spec_files import TableFile, all_table_files
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.pauses import pause, resume
from embedding_pipeline.store.project_schema import require_current


class ResumeConfig(dg.Config):
    """Which table or column."""

    table: str = Field(description="The source table, as its YAML names it.")
    column: str | None = Field(None, description="One embedding column. Left out: the whole table.")


class PauseConfig(ResumeConfig):
    """Which table or column, who wants it, and why."""

    reason: str | None = Field(None, description="Shown wherever somebody wonders.")
    by: str = Field("somebody in the Dagster UI", description="Who wants it.")


def _chosen(config: ResumeConfig) -> tuple[TableFile, list[EmbeddingSpec]]:
    [chosen] = select(all_table_files(), [config.table], [config.column] if config.column else [])
    return chosen


def _observe(
    context: dg.OpExecutionContext, chosen: tuple[TableFile, list[EmbeddingSpec]], words: str
) -> None:
    """Leave a note among the events of each column's asset, where people look."""
    file, embeddings = chosen
    for embedding in embeddings:
        context.log_event(
            dg.AssetObservation(names.column_key(file.spec, embedding), description=words)
        )


@dg.op(
    name="pause_table_or_column",
    description="Notes in the database that a table or a column is to be left alone. Its sensor "
    "and the nightly schedule then skip it and say why; a run in progress stops at its next "
    "request and keeps what it finished.",
    out=dg.Out(str, description="Who paused it, since when and why."),
)
def pause_op(context: dg.OpExecutionContext, config: PauseConfig) -> dg.Output[str]:
    tag_process(context.instance, context.run)
    try:
        chosen = _chosen(config)
        with connect() as connection:
            require_current(connection)
            facts = bind_columns(connection, chosen[0].spec)[0].facts
            held, new = pause(connection, facts, config.column, by=config.by, reason=config.reason)
    except PipelineError as error:
        raise failure(error) from None
    _observe(context, chosen, str(held))
    context.log.info("%s: %s", config.table, held)
    return dg.Output(
        str(held),
        metadata={
            "by": held.by,
            "reason": held.reason or "",
            "since": dg.MetadataValue.timestamp(held.since),
            "was_paused_before": not new,
        },
    )


@dg.op(
    name="resume_table_or_column",
    description="Lifts a pause. The table's sensor, or a materialisation, then goes on with what "
    "is pending.",
    out=dg.Out(int, description="Pauses that were lifted."),
)
def resume_op(context: dg.OpExecutionContext, config: ResumeConfig) -> dg.Output[int]:
    tag_process(context.instance, context.run)
    try:
        chosen = _chosen(config)
        with connect() as connection:
            require_current(connection)
            facts = bind_columns(connection, chosen[0].spec)[0].facts
            lifted = resume(connection, facts, config.column)
    except PipelineError as error:
        raise failure(error) from None
    if lifted:
        _observe(context, chosen, "resumed; it was " + "; ".join(map(str, lifted)))
    else:
        context.log.warning("%s was not paused", config.table)
    return dg.Output(
        len(lifted), metadata={"lifted": "; ".join(map(str, lifted)) or "it was not paused"}
    )


@dg.job(
    name="pause_embedding",
    description="Pauses a table, or one of its embedding columns: nothing of it is embedded until "
    "somebody resumes it. Runs in progress stop at their next request and keep what they have "
    "finished. The same as `embedding-pipeline pause TABLE [COLUMN]`.",
)
def pause_embedding() -> None:
    pause_op()


@dg.job(
    name="resume_embedding",
    description="Resumes a paused table or column: its sensor, or a materialisation, embeds what "
    "is pending. The same as `embedding-pipeline resume TABLE [COLUMN]`.",
)
def resume_embedding() -> None:
    resume_op()
