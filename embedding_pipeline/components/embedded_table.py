"""The `EmbeddedTable` component: one table's YAML → its assets, checks and sensor."""

from pathlib import Path
from typing import Any, Self

import dagster as dg
from pydantic import BaseModel, ConfigDict

from embedding_pipeline.components.assets import (
    embedding_asset,
    index_asset,
    quality_asset,
    source_asset,
)
from embedding_pipeline.components.checks import column_checks
from embedding_pipeline.components.sensor import table_sensor
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.spec_files import TableFile, load_table, table_from_attributes
from embedding_pipeline.templates import template_scope


class EmbeddedTableAttributes(BaseModel):
    """The YAML's attributes before templates are resolved.

    Anything is let through on purpose: `spec.TableSpec` does the checking, with errors that name
    file, line and remedy. The schema, for `dg` and editors, is that model's.
    """

    model_config = ConfigDict(extra="allow")

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """`TableSpec`'s schema, where a template may stand for any single value."""
        return dict(_with_templates(TableSpec.model_json_schema(*args, **options)))


def _with_templates(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_templates(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _with_templates(part) for key, part in schema.items()}
    if "enum" not in schema and schema.get("type") not in ("integer", "number", "boolean"):
        return schema
    described = {
        key: schema.pop(key) for key in ("title", "description", "default") if key in schema
    }
    return {**described, "anyOf": [schema, {"type": "string", "pattern": r"\{\{"}]}


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
            description="A table's embedding columns: partitioned assets, checks and a sensor."
        )

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:
        source = context.resolution_context.source_position_tree
        if source is not None:
            position = source.position
            return cls(load_table(Path(position.filename), position.start.line))
        # not from a file: `EmbeddedTable.from_attributes_dict`
        given = attributes.model_dump() if attributes else {}
        return cls(table_from_attributes(given, context.path))

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
