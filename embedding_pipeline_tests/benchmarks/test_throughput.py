"""The parts that embed: each runs, is checked against the truth, and notices a wrong vector."""

from pathlib import Path

import numpy as np
import psycopg
import pytest

from benchmarks import corpus
from benchmarks.clients import CLIENTS
from benchmarks.endpoint import Endpoint
from benchmarks.lab import Lab, column_of, make_documents, table_spec
from benchmarks.parts import throughput
from benchmarks.sizes import TINY
from benchmarks.truth import WrongVectorError, check_rows
from benchmarks.worker import measure
from embedding_pipeline.embedders import Endpoint as Provider
from embedding_pipeline.embedders import create_embedder
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.rows import fill

ROWS = TINY.rows


def task(endpoint: Endpoint, job: str, **changes: object) -> dict[str, object]:
    return {
        "job": job,
        "endpoint": endpoint.url,
        "batch": 16,
        "concurrency": 4,
        "dimensions": 384,
        "rows": ROWS,
    } | changes


@pytest.mark.parametrize("dialect", ["openai", "tei"])
def test_the_endpoint_gives_each_text_its_own_vector(dialect: str) -> None:
    import asyncio

    texts = [corpus.text(number) for number in range(1, 40)]

    async def ask(address: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        provider = Provider(name="bench", dialect=dialect, base_url=address)  # type: ignore[arg-type]
        embedder = create_embedder(provider, "sentence-transformers/all-MiniLM-L6-v2", 384)
        await embedder.start()
        try:
            return (await embedder.embed(texts)).vectors
        finally:
            await embedder.aclose()

    with Endpoint(384) as endpoint:
        # this dialect's answer names the model that was asked for
        vectors = asyncio.run(ask(endpoint.url if dialect == "tei" else endpoint.openai_url))
        counts = endpoint.counts(reset=True)
        assert endpoint.counts()["inputs"] == 0
    assert counts["inputs"] == len(texts)
    np.testing.assert_array_equal(vectors, [corpus.vector_of(text, 384) for text in texts])
    assert len({vector.tobytes() for vector in vectors}) == len(texts)


def test_texts_are_unique_and_of_100_to_200_words() -> None:
    texts = [corpus.text(n, revision) for n in range(1, 300) for revision in (0, 1)]
    assert len(set(texts)) == len(texts)
    assert all(100 <= len(text.split()) <= 200 for text in texts)


def test_a_limited_endpoint_refuses_what_is_beyond(lab: Lab) -> None:
    with Endpoint(384, per_second=1.0) as endpoint, pytest.raises(RuntimeError, match="429"):
        measure(lab, task(endpoint, "client", client="raw", batch=1))


@pytest.mark.parametrize("job", ["core", "script"])
def test_one_wrong_vector_among_all_is_found(lab: Lab, job: str) -> None:
    # a vector of another text is of the right width and length: only comparing finds it
    with (
        Endpoint(384, spoil=ROWS // 2) as endpoint,
        pytest.raises(WrongVectorError, match=rf"1 of {ROWS} rows are wrong: .* another text's"),
    ):
        throughput.embed_and_check(
            lab, table_spec(384), task(endpoint, job), rows=ROWS, fingerprints=job == "core"
        )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("UPDATE documents SET embedding_384 = NULL WHERE id = 3", "3 has no vector"),
        ("UPDATE documents SET body = body || '!' WHERE id = 3", "3 has another text's vector"),
        (
            "UPDATE documents SET embedding_384_fingerprint = gen_random_uuid() WHERE id = 3",
            "3 has another fingerprint",
        ),
        ("DELETE FROM documents WHERE id = 3", "5 rows, 6 expected"),
    ],
)
def test_every_kind_of_wrong_row_is_found(database: str, damage: str, words: str) -> None:
    spec = table_spec(384)
    make_documents(database, spec, 6)
    column = column_of(database, spec)
    with connect(database) as connection:
        fill(connection, column)
        _correct_vectors(connection)
        assert check_rows(database, column, rows=6) == 6
        connection.execute(damage.encode())
    with pytest.raises(WrongVectorError, match=words):
        check_rows(database, column, rows=6)


def _correct_vectors(connection: "psycopg.Connection[tuple[object, ...]]") -> None:
    for number in range(1, 7):
        vector = corpus.vector_of(corpus.text(number), 384)
        connection.execute(
            "UPDATE documents SET embedding_384 = $1::text::vector WHERE id = $2",
            [str(vector.tolist()), number],
        )


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_brings_every_vector(lab: Lab, client: str) -> None:
    with Endpoint(384) as endpoint:
        usage = measure(lab, task(endpoint, "client", client=client))
        counts = endpoint.counts()
    assert usage.result["written"] == ROWS
    # and the first one, before the clocks ran
    assert counts["inputs"] == ROWS + 1
    assert usage.client_cpu > 0


def test_the_core_is_measured_against_its_floors(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "CASES", [(384, "tei", "bigint"), (384, "openai", "uuid")])
    [table] = throughput.write_bound(lab, TINY)
    assert [row["what"] for row in table.rows][:3] == [
        "floor: staged COPY and UPDATE, nothing else",
        "floor: requests only (openai)",
        "the core",
    ]
    cases = {row["case"] for row in table.rows}
    assert cases == {"384 dimensions, tei, bigint keys", "384 dimensions, openai, uuid keys"}
    assert table.rows[0]["time"] == "1.00 ×"


def test_requests_in_flight_and_the_script_are_measured(lab: Lab) -> None:
    [table] = throughput.endpoint_bound(lab, TINY)
    assert table.rows[0]["what"] == "floor: requests only"
    assert "hand-written script" in str(table.rows[2]["what"])


def test_a_failed_job_says_why(lab: Lab, tmp_path: Path) -> None:
    with Endpoint(384) as endpoint, pytest.raises(RuntimeError, match="KeyError: 'no such client'"):
        measure(lab, task(endpoint, "client", client="no such client"))


def test_the_server_s_cpu_time_holds_that_of_sessions_that_ended(lab: Lab) -> None:
    before = lab.cpu_seconds()
    with connect(lab.url) as connection:
        connection.execute("SELECT count(md5(i::text)) FROM generate_series(1, 600000) AS i")
    # the postmaster takes a moment to notice the end; the figure never goes back
    while (after := lab.cpu_seconds()) - before < 0.05:
        pass
    assert lab.cpu_seconds() >= after
