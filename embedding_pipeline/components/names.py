"""Dagster's names for a table's parts, made in one place."""

from collections.abc import Mapping, Sequence

import dagster as dg

from embedding_pipeline.spec import (
    EmbeddingSpec,
    HashPartitions,
    MonthPartitions,
    TableSpec,
    dagster_name,
)
from embedding_pipeline.store.partitions import static_keys

OWNED = "embedding_pipeline"
"""Prefix of our own run tags."""
TABLE_TAG = f"{OWNED}/table"
COLUMN_TAG = f"{OWNED}/column"


def source_key(table: TableSpec) -> dg.AssetKey:
    """The source table itself, an external asset."""
    return dg.AssetKey([table.asset_name])


def column_key(table: TableSpec, embedding: EmbeddingSpec) -> dg.AssetKey:
    """`[table, column]`."""
    return dg.AssetKey([table.asset_name, dagster_name(embedding.column)])


def index_key(table: TableSpec, embedding: EmbeddingSpec) -> dg.AssetKey:
    """`[table, column_index]`."""
    return dg.AssetKey([table.asset_name, f"{dagster_name(embedding.column)}_index"])


def quality_key(table: TableSpec) -> dg.AssetKey:
    """`[table, retrieval_quality]`."""
    return dg.AssetKey([table.asset_name, "retrieval_quality"])


def sensor_name(table: TableSpec) -> str:
    return f"{table.asset_name}_pending"


def partitions_definition(
    table: TableSpec,
) -> dg.StaticPartitionsDefinition | dg.DynamicPartitionsDefinition:
    """Static buckets, or dynamic keys that the sensor keeps up to date and never deletes.

    Keys outlive the rows, so a table that is partitioned by another column gets other keys. The
    dot, which no encoded name has, keeps one table's name from being another's.
    """
    if isinstance(table.partitions, HashPartitions):
        keys = static_keys(table)
        assert keys is not None
        return dg.StaticPartitionsDefinition(keys)
    column = dagster_name(table.partitions.column)
    month = ".month" if isinstance(table.partitions, MonthPartitions) else ""
    return dg.DynamicPartitionsDefinition(name=f"{table.asset_name}.{column}{month}")


def known_partitions(instance: dg.DagsterInstance, table: TableSpec) -> list[str]:
    """The partition keys in Dagster's own order: a range is contiguous in this order only."""
    definition = partitions_definition(table)
    if isinstance(definition, dg.DynamicPartitionsDefinition):
        return list(instance.get_dynamic_partitions(str(definition.name)))
    return list(definition.get_partition_keys())


def add_partitions(instance: dg.DagsterInstance, table: TableSpec, keys: list[str]) -> list[str]:
    """Make partitions of keys that Dagster does not know yet; returns the new ones."""
    definition = partitions_definition(table)
    if not isinstance(definition, dg.DynamicPartitionsDefinition):
        return []
    known = set(known_partitions(instance, table))
    new = sorted(key for key in keys if key not in known)
    if new:
        instance.add_dynamic_partitions(str(definition.name), new)
    return new


def range_tags(first: str, last: str) -> dict[str, str]:
    """Tags that make one run cover a contiguous range of partitions."""
    return {
        "dagster/asset_partition_range_start": first,
        "dagster/asset_partition_range_end": last,
    }


def partitions_of_range(tags: Mapping[str, str], order: Sequence[str]) -> list[str]:
    """The partitions that a run's tags cover; none where they name unknown ones."""
    first = tags.get("dagster/asset_partition_range_start", tags.get("dagster/partition"))
    last = tags.get("dagster/asset_partition_range_end", first)
    if first not in order or last not in order:
        return []
    return list(order[order.index(first) : order.index(last) + 1])
