"""Dagster's names for a table's parts, and its partitions in a real (ephemeral) instance."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.utils import DISALLOWED_NAMES

from embedding_pipeline.components import names
from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.spec import RESERVED_WORDS, dagster_name, undagster_name
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline_tests.tables import embedding, spec

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")

BY_TENANT = {"by": "column", "column": "tenant"}
BY_MONTH = {"by": "month", "column": "made"}
BY_HASH = {"by": "hash", "buckets": 3}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def test_the_keys_of_a_tables_assets() -> None:
    table = spec("docs")
    (column,) = table.embeddings
    assert names.source_key(table) == dg.AssetKey(["docs"])
    assert names.column_key(table, column) == dg.AssetKey(["docs", "embedding_4"])
    assert names.index_key(table, column) == dg.AssetKey(["docs", "embedding_4_index"])
    assert names.quality_key(table) == dg.AssetKey(["docs", "retrieval_quality"])
    assert names.sensor_name(table) == "docs_pending"


@pytest.mark.parametrize("partitions", [BY_TENANT, BY_MONTH, BY_HASH], ids=str)
@pytest.mark.parametrize(
    "table",
    ["Order", "sales.order lines", '"a.b"."the ""best"""', "año", '"_x2."', "input", "class", "*"],
)
def test_dagster_takes_any_table_and_column_name(table: str, partitions: dict[str, object]) -> None:
    file = TableFile(
        spec(
            table,
            embeddings=[embedding("Emb-4 é"), embedding('"', baseline="Emb-4 é"), embedding("/")],
            partitions=partitions,
        ),
        Path("defs.yaml"),
    )
    definitions = table_definitions(file)
    dg.Definitions.validate_loadable(definitions)
    assert len(definitions.resolve_all_asset_keys()) == 1 + 3 + 3 + 1


def test_the_words_that_dagster_refuses_are_known() -> None:
    assert set(DISALLOWED_NAMES) == RESERVED_WORDS
    for word in RESERVED_WORDS:
        assert undagster_name(dagster_name(word)) == word
        assert dagster_name(word) not in DISALLOWED_NAMES


def test_tables_with_names_alike_load_side_by_side() -> None:
    tables = ["a.b", "a_x2e_b", "a_b", "A_b", '"a.b"', "a b"]
    dg.Definitions.validate_loadable(
        dg.Definitions.merge(
            *(table_definitions(TableFile(spec(table), Path("defs.yaml"))) for table in tables)
        )
    )


def test_each_partitioning_has_keys_of_its_own() -> None:
    """Keys are never deleted: a table partitioned by another column must not keep the old ones."""
    tables = [
        spec("docs", partitions=BY_TENANT),
        spec("docs", partitions=BY_TENANT | {"column": "region"}),
        spec("docs", partitions=BY_TENANT | {"column": "tenant.month"}),
        spec("docs", partitions=BY_MONTH | {"column": "tenant"}),
        spec("docs.tenant", partitions=BY_TENANT | {"column": "month"}),
        spec("docs_tenant", partitions=BY_TENANT | {"column": "month"}),
    ]
    found = {getattr(names.partitions_definition(table), "name", None) for table in tables}
    assert len(found) == len(tables)
    assert None not in found


def test_buckets_are_static_partitions(instance: dg.DagsterInstance) -> None:
    table = spec(partitions=BY_HASH)
    assert names.known_partitions(instance, table) == ["0", "1", "2"]
    assert names.add_partitions(instance, table, ["0", "9"]) == []
    assert names.known_partitions(instance, table) == ["0", "1", "2"]


def test_partitions_follow_the_data_and_are_never_deleted(instance: dg.DagsterInstance) -> None:
    table, other = spec("docs"), spec("other")
    assert names.known_partitions(instance, table) == []
    assert names.add_partitions(instance, table, ["b", "a"]) == ["a", "b"]
    assert names.add_partitions(instance, table, ["a", "(null)", "c"]) == ["(null)", "c"]
    assert names.add_partitions(instance, table, ["c"]) == []
    assert names.add_partitions(instance, table, []) == []
    assert names.known_partitions(instance, table) == ["a", "b", "(null)", "c"]
    assert names.known_partitions(instance, other) == []


def test_the_tags_of_a_range_name_its_partitions() -> None:
    order = ["b", "a", "d", "c"]
    assert names.partitions_of_range(names.range_tags("a", "c"), order) == ["a", "d", "c"]
    assert names.partitions_of_range(names.range_tags("a", "a"), order) == ["a"]
    assert names.partitions_of_range({"dagster/partition": "d"}, order) == ["d"]


@pytest.mark.parametrize(
    "tags",
    [{}, names.range_tags("a", "x"), names.range_tags("x", "a"), names.range_tags("b", "a")],
    ids=str,
)
def test_tags_that_name_no_range_name_no_partitions(tags: dict[str, str]) -> None:
    assert names.partitions_of_range(tags, ["a", "b"]) == []


def test_dagster_runs_the_partitions_of_a_range_in_the_order_that_we_take_it_for(
    instance: dg.DagsterInstance,
) -> None:
    """Dynamic partitions keep the order in which they were made."""
    seen: list[str] = []
    table = spec()
    definition = names.partitions_definition(table)

    @dg.asset(partitions_def=definition, backfill_policy=dg.BackfillPolicy.single_run())
    def rows(context: dg.AssetExecutionContext) -> None:
        seen.extend(context.partition_keys)

    names.add_partitions(instance, table, ["m", "z"])
    names.add_partitions(instance, table, ["a", "b%2C"])
    tags = names.range_tags("z", "b%2C")
    assert dg.materialize([rows], instance=instance, tags=tags).success
    assert seen == ["z", "a", "b%2C"]
    assert seen == names.partitions_of_range(tags, names.known_partitions(instance, table))
