"""The worked example's lexicon, embedded by the local model server and evaluated end to end."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_pipeline.embedders import Embedder, Endpoint, create_embedder
from embedding_pipeline.evaluation.compare import compare
from embedding_pipeline.evaluation.evaluate import evaluate_column
from embedding_pipeline.evaluation.golden_set import GoldenSet, load_golden_set
from embedding_pipeline.evaluation.report import quality_report
from embedding_pipeline.evaluation.result import Evaluation
from embedding_pipeline.evaluation.vectors import vectors_valid
from embedding_pipeline.evaluation.verdict import (
    golden_mrr_verdict,
    index_recall_verdict,
    vectors_valid_verdict,
)
from embedding_pipeline.local.model_server import ensure_model_server, stop_model_server
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.evaluation.tables import Connection, build_index, fill

PACKAGE = Path(__file__).parents[2] / "embedding_pipeline"
ROWS = [
    json.loads(line)
    for line in (PACKAGE / "local/sample_rows/lexicon.jsonl").read_text().splitlines()
]
TEXTS = [f"{row['term']}: {row['definition']}" for row in ROWS]
TABLE = TableSpec.model_validate(
    {
        "table": "lexicon",
        "id_column": "term_id",
        "text": "term || ': ' || definition",
        "embeddings": [
            {
                "column": "embedding_384",
                "dimensions": 384,
                "provider": "tei",
                "model": "sentence-transformers/all-MiniLM-L6-v2",
            },
            {
                "column": "embedding_1536",
                "dimensions": 1536,
                "provider": "local",
                "model": "all-minilm-l6-v2-layers",
                "baseline": "embedding_384",
            },
        ],
    }
)


class Server:
    """The local model server, both dialects."""

    def __init__(self, url: str) -> None:
        self.url = url

    def make_embedder(self, embedding: EmbeddingSpec) -> Embedder:
        dialect: Any = "tei" if embedding.provider == "tei" else "openai"
        endpoint = Endpoint(
            name=embedding.provider,
            dialect=dialect,
            base_url=self.url if dialect == "tei" else f"{self.url}/v1",
            max_inputs=64,
        )
        return create_embedder(endpoint, embedding.model, embedding.dimensions)

    def total(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/stats", timeout=30) as answer:
            total: dict[str, int] = json.load(answer)["total"]
        return total


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("model")
    yield Server(ensure_model_server(home))
    stop_model_server(home)


@pytest.fixture(scope="module")
def vectors(server: Server) -> dict[str, dict[str, list[float]]]:
    """Column → text → vector; computed once, stored by each test in its own database."""

    async def embed(embedding: EmbeddingSpec) -> dict[str, list[float]]:
        embedder = server.make_embedder(embedding)
        await embedder.start()
        result = await embedder.embed(TEXTS)
        await embedder.aclose()
        assert result.done.all()
        return dict(zip(TEXTS, result.vectors.tolist(), strict=True))

    return {each.column: asyncio.run(embed(each)) for each in TABLE.embeddings}


@pytest.fixture
def columns(connection: Connection, vectors: dict[str, dict[str, list[float]]]) -> list[Column]:
    connection.execute(
        "CREATE TABLE lexicon (term_id text PRIMARY KEY, term text, definition text)"
    )
    connection.cursor().executemany(
        "INSERT INTO lexicon VALUES ($1, $2, $3)",
        [(row["term_id"], row["term"], row["definition"]) for row in ROWS],
    )
    migrate(connection, [TABLE])
    bound = bind_columns(connection, TABLE)
    for column in bound:
        fill(connection, column, vectors[column.embedding.column])
        build_index(connection, column)
    return bound


@pytest.fixture(scope="module")
def golden() -> GoldenSet:
    return load_golden_set(PACKAGE / "defs/lexicon/golden_set.jsonl", TABLE)


def evaluate(
    connection: Connection, column: Column, golden: GoldenSet, server: Server
) -> Evaluation:
    return asyncio.run(evaluate_column(connection, column, golden, server.make_embedder))


def test_both_columns_are_good_and_evaluating_again_sends_nothing(
    connection: Connection, columns: list[Column], golden: GoldenSet, server: Server
) -> None:
    small, large = (evaluate(connection, column, golden, server) for column in columns)
    assert small.mrr_at_5 is not None
    assert 0.75 < small.mrr_at_5 < 1
    assert small.coverage == large.coverage == 1.0
    assert small.missing_expected == 0
    assert golden_mrr_verdict(small, None, floor=0.75, ratio=0.9).passed
    judged = golden_mrr_verdict(
        large, small, floor=0.75, ratio=0.9, baseline_column="embedding_384"
    )
    assert judged.passed, judged.summary
    for each in (small, large):
        assert index_recall_verdict(each.measured_index, 0.95, pending=0).passed
    for column in columns:
        assert vectors_valid_verdict(vectors_valid(connection, column)).passed
    report = quality_report(
        "lexicon", [small, large], {"embedding_1536": "embedding_384"}, {"embedding_384": [small]}
    )
    assert report.count("\n") > 10

    before = server.total()
    again = [evaluate(connection, column, golden, server) for column in columns]
    assert server.total() == before
    assert [each.mrr_at_5 for each in again] == [small.mrr_at_5, large.mrr_at_5]
    assert compare(again[0], small).ties == len(golden)


def test_vectors_shuffled_between_rows_fail(
    connection: Connection,
    columns: list[Column],
    golden: GoldenSet,
    server: Server,
    vectors: dict[str, dict[str, list[float]]],
) -> None:
    small, large = columns
    baseline = evaluate(connection, small, golden, server)
    own = vectors["embedding_1536"]
    order = np.random.default_rng(0).permutation(len(TEXTS))
    fill(connection, large, {text: own[TEXTS[order[n]]] for n, text in enumerate(TEXTS)})
    found = evaluate(connection, large, golden, server)
    assert found.mrr_at_5 is not None
    assert found.mrr_at_5 < 0.1
    for floor in (0.75, 0.0):
        judged = golden_mrr_verdict(
            found, baseline, floor=floor, ratio=0.9, baseline_column="embedding_384"
        )
        assert (judged.status, judged.severity) == ("failed", "error")
