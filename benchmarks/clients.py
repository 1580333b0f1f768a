"""The `openai` package used in five ways: what each lever brings.

Every one sends the same batches with the same number in flight and ends with float32 arrays.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.endpoint import MODEL_OPENAI
from embedding_pipeline.embedders import Endpoint
from embedding_pipeline.embedders.openai import OpenAIWire

Task = Mapping[str, Any]
Batches = Sequence[list[str]]
Send = Callable[[list[str]], Awaitable[int]]


async def _all(batches: Batches, concurrency: int, send: Send) -> int:
    """So many in flight until all batches are sent; returns the vectors that came back."""
    waiting = iter(batches)
    done = 0

    async def one() -> None:
        nonlocal done
        for batch in waiting:
            came = await send(batch)
            done += came

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one())
    return done


def _client(task: Task, *, aiohttp: bool) -> Any:
    import openai

    http = openai.DefaultAioHttpClient() if aiohttp else None
    return openai.AsyncOpenAI(
        api_key="none", base_url=task["endpoint"] + "/v1", max_retries=0, http_client=http
    )


async def floats(task: Task, batches: Batches) -> int:
    """Numbers in JSON, parsed by the package."""
    async with _client(task, aiohttp=False) as client:

        async def send(batch: list[str]) -> int:
            answer = await client.embeddings.create(
                model=MODEL_OPENAI, input=batch, encoding_format="float"
            )
            return len(np.array([item.embedding for item in answer.data], dtype=np.float32))

        return await _all(batches, task["concurrency"], send)


async def parsed(task: Task, batches: Batches) -> int:
    """The package's own default: base64 on the wire, Python lists in the answer."""
    async with _client(task, aiohttp=False) as client:

        async def send(batch: list[str]) -> int:
            answer = await client.embeddings.create(model=MODEL_OPENAI, input=batch)
            return len(np.array([item.embedding for item in answer.data], dtype=np.float32))

        return await _all(batches, task["concurrency"], send)


async def _raw(task: Task, batches: Batches, *, aiohttp: bool) -> int:
    import base64

    from pydantic_core import from_json

    async with _client(task, aiohttp=aiohttp) as client:

        async def send(batch: list[str]) -> int:
            answer = await client.embeddings.with_raw_response.create(
                model=MODEL_OPENAI, input=batch, encoding_format="base64"
            )
            data = from_json(answer.content)["data"]
            rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
            return len(np.stack(rows))

        return await _all(batches, task["concurrency"], send)


async def raw(task: Task, batches: Batches) -> int:
    """The raw response, its base64 decoded straight to numpy."""
    return await _raw(task, batches, aiohttp=False)


async def raw_aiohttp(task: Task, batches: Batches) -> int:
    """The same over the package's aiohttp transport."""
    return await _raw(task, batches, aiohttp=True)


async def fastest(task: Task, batches: Batches) -> int:
    """And the body built here: the adapter that the product uses, with all its checks."""
    wire = OpenAIWire(MODEL_OPENAI, task["dimensions"])
    await wire.open(Endpoint(name="benchmark", dialect="openai", base_url=task["endpoint"] + "/v1"))

    async def send(batch: list[str]) -> int:
        return len((await wire.send(batch)).vectors)

    try:
        return await _all(batches, task["concurrency"], send)
    finally:
        await wire.close()


CLIENTS: dict[str, Callable[[Task, Batches], Coroutine[Any, Any, int]]] = {
    "floats": floats,
    "parsed": parsed,
    "raw": raw,
    "raw_aiohttp": raw_aiohttp,
    "fastest": fastest,
}
