"""The `EmbeddedTable` component: one table's YAML → its assets, checks and sensor."""

from typing import Any, Self

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field

from embedding_pipeline.components.assets import (
    embedding_asset,
    index_asset,
    quality_asset,
    source_asset,
)
from embedding_pipeline.components.checks import column_checks
from embedding_pipeline.components.sensor import table_sensor
from embedding_pipeline.spec_files import TableFile, load_table, template_scope


class EmbeddedTableAttributes(BaseModel):
    """The YAML's attributes before templates are resolved; `spec.TableSpec` checks the rest.

    Unknown keys are let through here on purpose: the check behind it names file, line and remedy.
    """

    model_config = ConfigDict(extra="allow")

    table: str = Field(description="Source table: name, or schema.name.")
    id_column: str | list[str] = Field("id", description="Primary key, a list when composite.")
    text: str = Field("", description="A column, or an SQL expression over the row.")
    eligible: str | None = Field(
        None, description="SQL condition; rows that fail it have no vector."
    )
    tenant_column: str | None = Field(None, description="Column that separates tenants.")
    partitions: dict[str, Any] | None = Field(
        None,
        description="{by: hash, buckets: 8}, {by: column, column: …} or {by: month, column: …}.",
    )
    embeddings: list[dict[str, Any]] = Field(
        default_factory=list, description="column, dimensions, provider, model, baseline …"
    )
    golden_set: str | None = Field(None, description="JSONL file beside this one.")


class EmbeddedTable(dg.Component):
    """Keeps a table's embedding columns complete, current and comparable."""

    def __init__(self, file: TableFile) -> None:
        self.file = file

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return EmbeddedTableAttributes

    @classmethod
    def get_additional_scope(cls) -> dict[str, Any]:
        return template_scope()

    @classmethod
    def get_spec(cls) -> dg.ComponentTypeSpec:
        return dg.ComponentTypeSpec(
            description="A table's embedding columns as partitioned assets with checks and a sensor."
        )

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:
        path = context.path if context.path.suffix == ".yaml" else context.path / "defs.yaml"
        return cls(load_table(path, attributes.model_dump() if attributes else None))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002
        return table_definitions(self.file)


def table_definitions(file: TableFile) -> dg.Definitions:
    """Every asset, check and sensor of one table."""
    table = file.spec
    return dg.Definitions(
        assets=[
            source_asset(table),
            *(embedding_asset(table, embedding) for embedding in table.embeddings),
            *(index_asset(table, embedding) for embedding in table.embeddings),
            quality_asset(file),
        ],
        asset_checks=[
            check for embedding in table.embeddings for check in column_checks(file, embedding)
        ],
        sensors=[table_sensor(file)],
    )
