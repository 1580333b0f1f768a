"""Every other part at its smallest: it runs, its checks bite, its table has what it promises."""

from typing import Any

import numpy as np
import pytest

from benchmarks import worker
from benchmarks.endpoint import Endpoint
from benchmarks.lab import Lab, make_documents, table_spec
from benchmarks.parts import (
    PARTS,
    dagster_share,
    freshness,
    growth,
    index,
    limited,
    model,
    unchanged,
    whole_run,
)
from benchmarks.parts.dagster_share import clean_environment
from benchmarks.parts.freshness_steps import STEPS
from benchmarks.sizes import FULL, QUICK, TINY, Sizes, changed
from embedding_pipeline.store.connection import connect


def test_nothing_pending_asks_the_endpoint_nothing(lab: Lab) -> None:
    [table] = unchanged.nothing_pending(lab, TINY)
    assert [row["rows"] for row in table.rows][:2] == [100, 300]


def test_a_run_over_a_table_that_is_not_up_to_date_is_no_figure_for_nothing_pending(
    lab: Lab,
) -> None:
    spec = table_spec(8)
    with (
        lab.database("tests-pending", lambda url: make_documents(url, spec, 5)) as url,
        Endpoint(8) as endpoint,
        pytest.raises(RuntimeError, match="OPENAI_API_KEY is not set"),
    ):
        worker.measure(
            lab,
            {
                "job": "repeated", "url": url, "spec": spec.model_dump(mode="json"),
                "endpoint": endpoint.url, "batch": 64, "concurrency": 8, "repeats": 1,
            },
            clean_environment(),
        )  # fmt: skip


def test_changed_rows_cost_their_own_requests(lab: Lab) -> None:
    [table] = unchanged.one_percent(lab, TINY)
    [row] = table.rows
    assert (row["what"], row["requests"]) == ("1 of 150 rows changed", 1)


def test_memory_is_measured_at_each_size(lab: Lab) -> None:
    [table] = unchanged.memory(lab, TINY)
    assert [row["rows"] for row in table.rows] == [100, 200]
    assert all(float(str(row["bare process, MB"])) > 20 for row in table.rows)


def test_loading_the_definitions_is_measured_beyond_dagster(lab: Lab) -> None:
    [table] = dagster_share.imports(lab, TINY)
    dagster, ours, _ = table.rows
    assert int(str(dagster["modules"])) > int(str(ours["modules"])) > 20


def test_ten_rows_as_runs(lab: Lab) -> None:
    [table] = dagster_share.ten_rows(lab, TINY)
    assert len(table.rows) == 3
    assert table.rows[0]["ratio"] == "1.00 ×"


def test_the_same_rows_as_a_dagster_run(lab: Lab) -> None:
    [table] = whole_run.bulk_run(lab, TINY)
    floor, core, run = table.rows
    assert floor["time"] == "1.00 ×"
    assert all(float(str(row["client CPU-s / 1,000 rows"])) > 0 for row in (core, run))


def test_ticks_of_a_sensor_that_works(lab: Lab) -> None:
    [table] = dagster_share.sensor_tick(lab, TINY)
    assert [row["pending"] for row in table.rows] == [
        "nothing",
        "a row in each of 1 tenants, every column",
    ]


def test_an_index_is_built_in_four_ways_and_written_to_in_two(lab: Lab) -> None:
    built, loaded = index.index(lab, TINY)
    by_name = {str(row["index"]): row for row in built.rows}
    halfvec = by_name["halfvec, as the product would build it"]
    vector = by_name["vector, as the product builds it"]
    assert float(str(halfvec["MB"])) < float(str(vector["MB"]))
    assert float(str(vector["recall@10"])) > 0.9
    assert float(str(loaded.figures["in_place seconds"])) > 0


def test_a_wrong_vector_in_the_index_part_is_found(lab: Lab) -> None:
    def fill(url: str) -> None:
        index._table(url, 5)

    with lab.database("tests-index", fill) as url, connect(url) as connection:
        index._check(connection, index.clustered(5, 1))
        with pytest.raises(AssertionError):
            index._check(connection, index.clustered(5, 2))


def test_growth_has_a_row_for_each_size(lab: Lab) -> None:
    embedding, writes = growth.growth(lab, TINY)
    assert [row["rows"] for row in embedding.rows] == [100, 200]
    assert [(row["rows"], row["statement"]) for row in writes.rows] == [
        (rows, f"{statement} {how}")
        for rows in (100, 200)
        for how in ("at once", "one by one")
        for statement in ("INSERT", "UPDATE")
    ]
    assert {"1 column", "2 columns"} < set(writes.columns)


def test_the_local_model_server_is_compared_with_itself(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(model.REFERENCE, raising=False)
    [table] = model.local_model(lab, TINY)
    assert float(str(table.rows[0]["memory, MB"])) > 50
    assert str(table.rows[0]["texts/s, of in-process"]).endswith(" ×")
    assert table.rows[1]["texts/s, of in-process"] == "1.00 ×"
    # what was not measured says so
    assert [row["texts/s, of sentence-transformers"] for row in table.rows] == [None] * 3
    assert "sentence-transformers was not measured" in table.notes[-1]


def test_other_vectors_than_the_server_s_end_the_model_part() -> None:
    vectors = np.eye(4, dtype=np.float32)
    model._same(vectors, vectors, "itself")
    with pytest.raises(RuntimeError, match="the vectors of another are other ones"):
        model._same(vectors, vectors[::-1], "another")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_commit_is_followed_to_search(lab: Lab) -> None:
    [table] = freshness.freshness(lab, changed(TINY, {"freshness_commits": 1}))
    [row] = table.rows
    assert row["commits"] == 1
    steps = [row[step] for step in STEPS]
    assert all(isinstance(step, float) and step >= 0 for step in steps)
    assert sum(map(float, map(str, steps))) == pytest.approx(float(str(row["median, s"])), abs=1)


def test_a_limited_endpoint_is_measured_with_every_limiter(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "LIMITERS", ["adaptive, limit unknown"])
    [table] = limited.limited(lab, TINY)
    assert [row["processes"] for row in table.rows] == [1, 3]


def test_every_part_of_the_issue_is_there() -> None:
    assert list(PARTS) == [
        "write", "endpoint", "levers", "nothing", "changed", "memory", "imports", "run", "bulk",
        "sensor", "index", "growth", "model", "fresh", "limited",
    ]  # fmt: skip


def test_the_command_line_changes_a_preset() -> None:
    given: dict[str, Any] = {"rows": 7, "rounds": None, "json": "file", "quick": True}
    assert changed(QUICK, given) == Sizes(**{**vars(QUICK), "rows": 7})
    assert FULL.table_rows == 1_000_000
