"""Columns, lineage and figures as a real run records them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.backfill import Counts, Outcome
from embedding_pipeline.components import names, table_metadata
from embedding_pipeline.components.assets import summary
from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.embed_column import ColumnRun
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.partitions import NULL_KEY
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.project import fresh_settings, use_database
from embedding_pipeline_tests.rows import make_column
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
RUN_FIGURES = ("pending", "rows_per_second", "run_tokens", "run_cost_usd", "run_seconds")


@pytest.fixture(autouse=True)
def server(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    with fresh_settings(), FaultServer(dimensions=4, model="test-model-4") as server:
        use_database(monkeypatch, database)
        monkeypatch.setenv("EMBEDDING_SERVICE_URL", server.tei_url)
        yield server


def execute(
    table: TableSpec, key: dg.AssetKey, instance: dg.DagsterInstance, **tags: str
) -> dg.ExecuteInProcessResult:
    definitions = dg.Definitions.merge(table_definitions(TableFile(table, Path("defs.yaml"))))
    job = definitions.get_repository_def().get_implicit_global_asset_job_def()
    return job.get_subset(asset_selection={key}).execute_in_process(
        instance=instance, tags=tags, raise_on_error=False
    )


def materialise(table: TableSpec, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    names.add_partitions(instance, table, ["a", "b", "c", NULL_KEY])
    order = names.known_partitions(instance, table)
    key = names.column_key(table, table.embeddings[0])
    return execute(table, key, instance, **names.range_tags(order[0], order[-1]))


class TestColumnsAndLineage:
    def test_what_the_text_and_the_eligibility_read(self, connection: Connection) -> None:
        create_docs(connection)
        column = make_column(connection, spec(text="body || coalesce(meta::text, '')"))
        assert table_metadata.read_columns(connection, column) == ["body", "meta"]

    def test_the_key_only_where_the_text_reads_it(self, connection: Connection) -> None:
        create_docs(connection)
        column = make_column(connection, spec(text="'id tenant ' || body"))
        assert table_metadata.read_columns(connection, column) == ["body"]
        with_key = spec(text="id::text || body", embeddings=[embedding("other")])
        assert table_metadata.read_columns(connection, make_column(connection, with_key)) == [
            "body",
            "id",
        ]

    @pytest.mark.parametrize(
        ("expression", "quoted", "found"),
        [
            ("(body || id)", "id", True),
            ("('the id' || body)", "id", False),
            ("('it''s id' || body)", "id", False),
            ('("Name" IS NULL)', '"Name"', True),
            ("id(body)", "id", False),
            ("(tenant_id || body)", "id", False),
            ("(a.id || body)", "id", False),
        ],
    )
    def test_names_are_told_from_texts_and_functions(
        self, expression: str, quoted: str, found: bool
    ) -> None:
        assert table_metadata.names_it(expression, quoted) is found

    def test_a_run_records_schema_and_lineage(self, connection: Connection) -> None:
        create_docs(connection)
        column = make_column(connection, spec())
        with dg.DagsterInstance.ephemeral() as instance:
            assert materialise(column.table, instance).success
            event = instance.get_latest_materialization_event(
                names.column_key(column.table, column.embedding)
            )
        assert event is not None
        assert event.asset_materialization is not None
        recorded = event.asset_materialization.metadata
        schema, lineage = recorded["dagster/column_schema"], recorded["dagster/column_lineage"]
        assert isinstance(schema, dg.TableSchemaMetadataValue)
        assert isinstance(lineage, dg.TableColumnLineageMetadataValue)
        shown = {each.name: each for each in schema.schema.columns}
        assert list(shown) == ["id", "body", "embedding_4", "embedding_4_fingerprint"]
        assert shown["id"].type == "bigint"
        assert shown["id"].description == "the row's key"
        assert shown["id"].constraints.unique
        assert not shown["id"].constraints.nullable
        assert shown["body"].description == "the text that is embedded"
        assert shown["embedding_4"].type.endswith("vector(4)")
        assert shown["embedding_4"].description == "4-dim vector by test-model-4"
        made_of = lineage.lineage.deps_by_column
        assert made_of["embedding_4"] == [dg.TableColumnDep(dg.AssetKey("docs"), "body")]
        assert made_of["embedding_4_fingerprint"] == made_of["embedding_4"]


class TestSourceTable:
    def test_observing_counts_rows_and_what_each_column_has_pending(
        self, connection: Connection
    ) -> None:
        create_docs(connection, 20)
        table = spec(embeddings=[embedding("one"), embedding("two")])
        make_column(connection, table)
        with dg.DagsterInstance.ephemeral() as instance:
            assert execute(table, names.source_key(table), instance).success
            seen = observed(instance, table)
        assert seen["dagster/row_count"] == 20
        assert seen["row_count_is_estimate"] is False
        assert seen["one_pending"] == seen["two_pending"] == 20
        assert seen["one_quarantined"] == 0
        schema = seen["columns"]
        assert [each.name for each in schema.columns][:3] == ["id", "body", "tenant"]
        assert {each.name: each.description for each in schema.columns}["tenant"] == "the partition"

    def test_a_column_of_another_recipe_hides_no_other(self, connection: Connection) -> None:
        create_docs(connection, 20)
        make_column(connection, spec(embeddings=[embedding("one"), embedding("two")]))
        table = spec(embeddings=[embedding("one", model="another"), embedding("two")])
        with dg.DagsterInstance.ephemeral() as instance:
            assert execute(table, names.source_key(table), instance).success
            seen = observed(instance, table)
        assert seen["two_pending"] == 20
        assert "one_pending" not in seen
        assert "**one**" in seen["not_counted"]
        assert "another" in seen["not_counted"]

    def test_a_large_table_is_estimated(
        self, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(table_metadata, "COUNTED_ROWS", 10)
        create_docs(connection, 2000)
        make_column(connection, spec())
        connection.execute("VACUUM ANALYZE docs")
        columns = bind_columns(connection, spec())
        rows = table_metadata.count_rows(connection, columns[0])
        assert rows is None
        seen = table_metadata.table_figures(connection, columns, rows)
        assert seen["row_count_is_estimate"] == dg.MetadataValue.bool(True)
        assert seen["dagster/row_count"] == 2000
        assert seen["embedding_4_pending"] == 2000

    def test_a_missing_table_is_named(self, connection: Connection) -> None:
        with dg.DagsterInstance.ephemeral() as instance:
            result = execute(spec(), names.source_key(spec()), instance)
        assert not result.success
        (failed,) = (event for event in result.all_events if event.is_step_failure)
        data = failed.step_failure_data.user_failure_data
        assert data is not None
        assert "there is no table docs" in str(data.description)


class TestFiguresThatPlot:
    def test_a_runs_own_are_the_same_on_each_partition_and_its_parts_add_up(
        self, connection: Connection
    ) -> None:
        create_docs(connection, 20)
        column = make_column(connection, spec())
        with dg.DagsterInstance.ephemeral() as instance:
            result = materialise(column.table, instance)
            seen = observed(instance, column.table)
        events = [
            event.step_materialization_data.materialization.metadata
            for event in result.all_events
            if event.is_step_materialization
        ]
        for event in events:
            for name in RUN_FIGURES:
                assert isinstance(event[name], dg.IntMetadataValue | dg.FloatMetadataValue), name
        figures: list[dict[str, Any]] = [
            {name: value.value for name, value in event.items()} for event in events
        ]
        assert len(figures) == 4
        for name in RUN_FIGURES:
            assert len({each[name] for each in figures}) == 1, name
        assert figures[0]["pending"] == 0
        assert figures[0]["run_tokens"] > 0
        assert sum(each["embedded"] for each in figures) == 20
        assert sum(each["dagster/partition_row_count"] for each in figures) == 20
        assert figures[0]["dagster/row_count"] == 20
        assert seen["embedding_4_pending"] == 0
        assert seen["dagster/row_count"] == 20


class TestWhatTheLogSays:
    def test_a_first_run(self) -> None:
        counts = Counts(read=247, embedded=240, quarantined=2, superseded=5)
        outcome = Outcome({"0": counts}, tokens=6749, requests=4, cost=0.25, seconds=2.04)
        assert summary(ColumnRun(outcome, {}, {}, 0.26), pending=5) == (
            "240 rows embedded in 2.0 s with 6,749 tokens for $0.2500 (forecast $0.2600); 5 were "
            "edited meanwhile, 2 were refused and are quarantined; 5 rows of the column are pending"
        )

    def test_nothing_to_do(self) -> None:
        assert summary(ColumnRun(Outcome({"0": Counts()}), {}, {}, 0.0), pending=0) == (
            "every row had its vector already, nothing was sent; nothing is pending now"
        )


def observed(instance: dg.DagsterInstance, table: TableSpec) -> dict[str, Any]:
    """The source table's latest observation, its values plain."""
    records = instance.fetch_observations(names.source_key(table), limit=1).records
    assert records, "the source table was not observed"
    observation = records[0].asset_observation
    assert observation is not None
    return {
        name: value.schema if isinstance(value, dg.TableSchemaMetadataValue) else value.value
        for name, value in observation.metadata.items()
    }
