"""The jobs that `worker.py` runs. Each prepares, and returns the function whose work is measured.

A job's imports and its inputs are no part of the measurement; what it must do to the rows is.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from benchmarks import corpus, endpoint
from benchmarks.lab import TABLE, column_of
from embedding_pipeline.backfill import Options, backfill
from embedding_pipeline.embedders import Endpoint, create_embedder
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect

Task = Mapping[str, Any]
Result = dict[str, Any]
Job = Callable[[Task], Callable[[], Result]]

FLOOR_CHUNK = 10_000


def core(task: Task) -> Callable[[], Result]:
    """The product's core, called directly: every pending row of the column."""
    column = column_of(task["url"], TableSpec.model_validate(task["spec"]))
    partitions = _partitions(task["url"], column)
    asyncio.run(warm(task, column))

    def work() -> Result:
        return asyncio.run(_core(task, column, partitions))

    return work


def _partitions(url: str, column: Column) -> list[str]:
    from embedding_pipeline.store.partitions import static_keys
    from embedding_pipeline.store.pending import count_by_partition

    keys = static_keys(column.table)
    if keys is not None:
        return list(keys)
    with connect(url) as connection:
        return list(count_by_partition(connection, column))


async def warm(task: Task, column: Column) -> None:
    """A first request: what it imports and loads, a process pays once and not a row."""
    embedding = column.embedding
    embedder = create_embedder(_endpoint(task), embedding.model, embedding.dimensions)
    await embedder.start()
    await embedder.embed(["the first request imports what the others use"])
    await embedder.aclose()


async def _core(task: Task, column: Column, partitions: Sequence[str]) -> Result:
    embedder = create_embedder(_endpoint(task), column.embedding.model, column.embedding.dimensions)
    await embedder.start()
    try:
        outcome = await backfill(
            task["url"],
            column,
            partitions,
            embedder,
            Options(batch_size=task["batch"], concurrency=task["concurrency"]),
        )
    finally:
        await embedder.aclose()
    total = outcome.total
    return {
        "written": total.written,
        "embedded": total.embedded,
        "requests": outcome.requests,
        "stopped": outcome.stopped,
        "left": total.superseded + total.locked + total.gone + total.quarantined,
    }


def _endpoint(task: Task) -> Endpoint:
    tei = task.get("dialect") == "tei"
    return Endpoint(
        name="benchmark",
        dialect="tei" if tei else "openai",
        base_url=task["endpoint"] if tei else task["endpoint"] + "/v1",
        concurrency=task["concurrency"],
        max_inputs=max(task["batch"], 32),
        model_aliases={endpoint.MODEL_OPENAI: [endpoint.MODEL_TEI]},
    )


def repeated(task: Task) -> Callable[[], Result]:
    """What a whole run does (identity, lease, count, backfill) where nothing is pending."""
    from embedding_pipeline.embed_column import embed_column

    column = column_of(task["url"], TableSpec.model_validate(task["spec"]))
    partitions = _partitions(task["url"], column)
    options = Options(batch_size=64, concurrency=8)

    def once() -> float:
        began = time.perf_counter()
        run = embed_column(task["url"], column, partitions, options, run_id=None)
        assert run.outcome.total.read == 0, run.outcome
        return time.perf_counter() - began

    def directly() -> float:
        began = time.perf_counter()
        result = asyncio.run(_core(task, column, partitions))
        assert result["written"] == 0, result
        return time.perf_counter() - began

    once(), directly()

    def work() -> Result:
        return {
            "run_ms": [1000 * once() for _ in range(task["repeats"])],
            "core_ms": [1000 * directly() for _ in range(task["repeats"])],
        }

    return work


def write_floor(task: Task) -> Callable[[], Result]:
    """The least that writing vectors takes: staged binary COPY and one UPDATE, no questions asked.

    Vectors are at hand; no fingerprint is compared, no row is locked first and no pending index is
    kept.
    """
    column = column_of(task["url"], TableSpec.model_validate(task["spec"]))
    dimensions = column.embedding.dimensions
    with connect(task["url"]) as connection:
        rows = connection.execute(f"SELECT id, body FROM {TABLE} ORDER BY id".encode()).fetchall()
        connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(column.pending_index)))
    keys = np.array([key for key, _ in rows], dtype=">i8")
    data = [text.encode() for _, text in rows]
    chosen = np.array([corpus.base_of(item) for item in data])
    own = np.array([corpus.own_values(item) for item in data], dtype=np.float32)
    bases = corpus.bases(dimensions)
    record = np.dtype(
        [
            ("fields", ">i2"), ("key_size", ">i4"), ("key", ">i8"),
            ("size", ">i4"), ("dimensions", ">i2"), ("unused", ">i2"),
            ("vector", ">f4", (dimensions,)),
        ]
    )  # fmt: skip

    def work() -> Result:
        seconds = cpu = 0.0
        with connect(task["url"]) as connection:
            for start in range(0, len(keys), FLOOR_CHUNK):
                part = slice(start, start + FLOOR_CHUNK)
                vectors = bases[chosen[part]]
                vectors[:, : corpus.OWN_VALUES] = own[part]
                began, began_cpu = time.perf_counter(), time.process_time()
                packed = np.empty(len(vectors), dtype=record)
                packed["fields"], packed["key_size"], packed["key"] = 2, 8, keys[part]
                packed["size"], packed["dimensions"], packed["unused"] = (
                    4 + 4 * dimensions, dimensions, 0,
                )  # fmt: skip
                packed["vector"] = vectors
                _staged(connection, column, packed)
                seconds += time.perf_counter() - began
                cpu += time.process_time() - began_cpu
        return {"written": len(keys), "seconds": seconds, "cpu": cpu}

    return work


def _staged(connection: "psycopg.Connection[Any]", column: Column, packed: Any) -> None:
    name = column.embedding.column
    with connection.transaction():
        connection.execute("CREATE TEMPORARY TABLE floor (key bigint, new vector) ON COMMIT DROP")
        with (
            connection.cursor() as cursor,
            cursor.copy("COPY pg_temp.floor FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.write(b"PGCOPY\n\xff\r\n\0" + b"\0" * 8)
            copy.write(memoryview(packed).cast("B"))
            copy.write(b"\xff\xff")
        connection.execute(
            f"UPDATE {TABLE} SET {name} = new FROM pg_temp.floor WHERE id = key".encode()
        )


def script(task: Task) -> Callable[[], Result]:
    """What everybody writes first: batches of 50, one after the other, one UPDATE a row."""
    import openai

    client = openai.OpenAI(api_key="none", base_url=task["endpoint"] + "/v1")
    name = TableSpec.model_validate(task["spec"]).embeddings[0].column

    def work() -> Result:
        written = 0
        with psycopg.connect(task["url"]) as connection:
            pending = connection.execute(
                f"SELECT id, body FROM {TABLE} WHERE {name} IS NULL ORDER BY id".encode()
            ).fetchall()
            for start in range(0, len(pending), 50):
                batch = pending[start : start + 50]
                answer = client.embeddings.create(
                    model=endpoint.MODEL_OPENAI, input=[text for _, text in batch]
                )
                for (key, _), item in zip(batch, answer.data, strict=True):
                    literal = "[" + ",".join(map(str, item.embedding)) + "]"
                    connection.execute(
                        f"UPDATE {TABLE} SET {name} = %s::vector WHERE id = %s".encode(),
                        (literal, key),
                    )
                    written += 1
                connection.commit()
        return {"written": written}

    return work


def client(task: Task) -> Callable[[], Result]:
    """Only the requests: texts in, float32 vectors out, nothing kept."""
    from benchmarks.clients import CLIENTS

    texts = [corpus.text(number) for number in range(1, task["rows"] + 1)]
    batches = [texts[i : i + task["batch"]] for i in range(0, len(texts), task["batch"])]
    send = CLIENTS[task.get("client", "fastest")]
    asyncio.run(send(task, [["the first request imports what the others use"]]))

    def work() -> Result:
        return {"written": asyncio.run(send(task, batches))}

    return work


JOBS: dict[str, Job] = {
    "repeated": repeated,
    "core": core,
    "write_floor": write_floor,
    "client": client,
    "script": script,
}
