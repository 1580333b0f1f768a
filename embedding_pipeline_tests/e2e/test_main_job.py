"""From an empty machine to a checked result, and a second time for nothing."""

import json

import pytest

from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline_tests.e2e.conftest import FirstRun
from embedding_pipeline_tests.e2e.project import Project

TABLES = ("bora_docs", "knowledge_chunks", "lexicon", "phrases")
COLUMNS = {
    "embedding_384": ("sentence-transformers/all-MiniLM-L6-v2", 384),
    "embedding_1536": ("all-minilm-l6-v2-layers", 1536),
}


def sample_rows(table: str) -> int:
    path = PROJECT_ROOT / f"embedding_pipeline/local/sample_rows/{table}.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines())


def golden_queries(table: str) -> int:
    path = PROJECT_ROOT / f"embedding_pipeline/defs/{table}/golden_set.jsonl"
    return len([line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])


@pytest.mark.slow
def test_run_from_nothing_embeds_every_row_of_all_eight_columns(first_run: FirstRun) -> None:
    project, done = first_run.project, first_run.done
    assert done.code == 0, done.out + done.err
    assert done.err == ""
    rows = {table: sample_rows(table) for table in TABLES}
    for table in TABLES:
        for column, (_, dimensions) in COLUMNS.items():
            counted = project.sql(
                f"SELECT count(*), count({column}), count({column}_fingerprint),"
                f" min(vector_dims({column})), max(vector_dims({column})) FROM {table}"
            )
            assert counted == [(rows[table], *[rows[table]] * 2, dimensions, dimensions)], table
            built = f"build the hnsw index {table}_{column}_hnsw of {table}.{column}"
            assert built in done.out.splitlines()
    cells = done.closing_table()
    assert list(cells) == [f"{table}.{column}" for table in TABLES for column in COLUMNS]
    for name, row in cells.items():
        total, embedded, pending, quarantined, tokens, cost, rate, mrr, hit, checks = row
        assert int(total) == int(embedded) == rows[name.split(".")[0]]
        assert (pending, quarantined, cost, checks) == ("0", "0", "$0.0000", "4/4"), name
        assert int(tokens.replace(",", "")) > int(total)
        assert float(rate) > 0
        assert 0.6 <= float(mrr) < 1.0
        assert 0.4 <= float(hit) <= float(mrr)


def test_status_and_evaluate_as_json(project: Project) -> None:
    status = project.run("status", "--json")
    assert status.code == 0
    # scripts rely on these nine; what a column has cost so far stands behind them
    assert [dict(list(row.items())[:9]) for row in status.json] == [
        {
            "table": table,
            "column": column,
            "model": model,
            "dimensions": dimensions,
            "rows": sample_rows(table),
            "embedded": sample_rows(table),
            "pending": 0,
            "quarantined": 0,
            "ineligible": 0,
        }
        for table in TABLES
        for column, (model, dimensions) in COLUMNS.items()
    ]
    evaluated = project.run("evaluate", "--table", "phrases", "--json")
    assert evaluated.code == 0
    assert [(row["table"], row["column"], row["model"]) for row in evaluated.json] == [
        ("phrases", column, model) for column, (model, _) in COLUMNS.items()
    ]
    for row in evaluated.json:
        assert list(row) == [
            "table",
            "column",
            "model",
            "queries",
            "mrr_at_5",
            "hit_at_1",
            "ndcg_at_10",
            "p50_ms",
            "p95_ms",
        ]
        assert row["queries"] == golden_queries("phrases")
        assert 0 < row["hit_at_1"] <= row["mrr_at_5"] < 1
        assert row["mrr_at_5"] <= row["ndcg_at_10"] + 0.2 <= 1.2
        assert 0 < row["p50_ms"] <= row["p95_ms"]


def test_a_second_run_embeds_nothing_and_sends_nothing(project: Project) -> None:
    before = project.stats()
    versions = {
        table: project.sql(f"SELECT ctid::text, xmin::text FROM {table}") for table in TABLES
    }
    done = project.run("run")
    assert done.code == 0, done.out + done.err
    assert done.err == ""
    assert project.stats() == before  # query vectors are cached too
    for table in TABLES:
        assert project.sql(f"SELECT ctid::text, xmin::text FROM {table}") == versions[table]
    for name, row in done.closing_table().items():
        assert f"{name}: nothing pending" in done.out
        assert (row[4], row[9]) == ("0", "4/4"), name
    print(f"second run: {done.seconds:.1f} s")


def test_the_ui_shows_every_run_and_check(first_run: FirstRun) -> None:
    # one run a column, one evaluation a table
    assert list(first_run.runs.values()) == ["SUCCESS"] * 12
    assert {status for _, _, status in first_run.checks} == {"SUCCEEDED"}
    assert {(*json.loads(key), name) for key, name, _ in first_run.checks} == {
        (table, column, name)
        for table in TABLES
        for column in COLUMNS
        for name in ("coverage", "golden_mrr", "vectors_valid", "index_recall")
    }
