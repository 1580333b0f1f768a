"""The job `retry_quarantined`: makes quarantined rows pending again, from the UI."""

import dagster as dg
from pydantic import Field

from embedding_pipeline.columns import select
from embedding_pipeline.components.assets import bind_column, failure
from embedding_pipeline.components.processes import tag_process
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec_files import all_table_files
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.retry import parse_keys, quarantined_rows, retry

LISTED = 20


class RetryConfig(dg.Config):
    """Which rows."""

    table: str = Field(description="The source table, as its YAML names it.")
    column: str = Field(description="The embedding column.")
    ids: list[str] | None = Field(
        None,
        description='Keys; of a composite key a JSON list, such as ["acme", 7]. '
        "Left out: every quarantined row of the column.",
    )
    partitions: list[str] | None = Field(
        None, description="Only rows of these partitions. Left out: of all."
    )


@dg.op(
    name="retry_quarantined_rows",
    description="Lets quarantined rows be tried again: they are pending, and the next run sends "
    "them to the provider. Their metadata lists what the provider said before.",
    out=dg.Out(int, description="Rows that are pending again."),
)
def retry_rows(context: dg.OpExecutionContext, config: RetryConfig) -> dg.Output[int]:
    tag_process(context.instance, context.run)
    try:
        [(file, _)] = select(all_table_files(), [config.table], [config.column])
        column = bind_column(file.spec, config.column)
        width = len(column.key_types)
        keys = None
        if config.ids is not None:
            keys = [key for text in config.ids for key in parse_keys(text, width)]
        with connect() as connection:
            before = quarantined_rows(connection, column, keys=keys, partitions=config.partitions)
            done = retry(connection, column, keys=keys, partitions=config.partitions)
    except PipelineError as error:
        raise failure(error) from None
    context.log.info("%s: %s rows are pending again", column, f"{done.rows:,}")
    if done.unknown:
        context.log.warning(
            "%s: not quarantined: %s", column, "; ".join(", ".join(key) for key in done.unknown)
        )
    listed = "\n".join(
        f"| {_cell(', '.join(row.key))} | {_cell(row.error)} | {row.attempts} |"
        for row in before[:LISTED]
    )
    return dg.Output(
        done.rows,
        metadata={
            "rows": done.rows,
            "not_quarantined": len(done.unknown),
            "errors": dg.MetadataValue.md(
                f"| key | the provider said | attempts |\n|---|---|---|\n{listed}"
            ),
        },
    )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


@dg.job(
    name="retry_quarantined",
    description="Makes quarantined rows of one embedding column pending again; the table's "
    "sensor, or a materialisation, then embeds them. The same as "
    "`embedding-pipeline retry TABLE COLUMN`.",
)
def retry_quarantined() -> None:
    retry_rows()
