"""An embedding server over a real socket that misbehaves as it is told to.

It speaks TEI's dialect (`/info`, `/embed`) and OpenAI's (`/v1/embeddings`), counts what it is
asked for, and answers with vectors that a test can know beforehand (`vector_for`). Each request
takes the next fault of the script (`FaultServer.script`), else what the rule says
(`FaultServer.rule`), else it is answered properly; poisoned texts are refused in any case.

    with FaultServer(dimensions=384) as server:
        server.script(Status(429, {"retry-after": "1"}), Reset())
        …
        assert server.count.requests == 3
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from aiohttp import web

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


def vector_for(text: str, dimensions: int, model: str) -> Vector:
    """The truth: unit float32 vector that depends on every character of text and model."""
    seed = f"{model}\n{text}".encode("utf-8", "surrogatepass")
    raw = np.frombuffer(hashlib.shake_256(seed).digest(4 * dimensions), dtype="<u4")
    vector = raw.astype(np.float64) / 2**31 - 1
    unit: Vector = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


@dataclass(frozen=True)
class Status:
    """An error answer; the body is the dialect's own, with these words."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    words: str = "scripted"
    code: str | None = None
    body: bytes | None = None


@dataclass(frozen=True)
class Hang:
    """Takes the request and does not answer for so long, until the client leaves or the server
    stops; answers properly after that."""

    seconds: float = math.inf


@dataclass(frozen=True)
class Reset:
    """Takes the request and closes the connection with RST."""


@dataclass(frozen=True)
class HalfResponse:
    """Promises the whole answer in Content-Length, sends half of it, closes."""


@dataclass(frozen=True)
class Drip:
    """A proper answer, twenty bytes a second: no single read takes long."""


@dataclass(frozen=True)
class Edit:
    """A proper answer, changed: the function gets the dialect's JSON and returns another."""

    change: Callable[[Any], Any]


@dataclass(frozen=True)
class Vectors:
    """A proper answer with other vectors: the function gets and returns float32 (n, d)."""

    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class RawBody:
    """200 with these bytes."""

    body: bytes


@dataclass(frozen=True)
class WrongModel:
    """A proper answer that names another model (OpenAI dialect; TEI says it in `/info`)."""

    name: str


Fault = Status | Hang | Drip | Reset | HalfResponse | Edit | Vectors | RawBody | WrongModel | None


def fewer(count: int = 1) -> Edit:
    """So many vectors fewer than inputs."""

    def change(answer: Any) -> Any:
        if isinstance(answer, list):
            return answer[:-count]
        return {**answer, "data": answer["data"][:-count]}

    return Edit(change)


def bad_value(value: float, position: int = 0) -> Vectors:
    """NaN, infinity or zero all over one vector."""

    def change(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        vectors[position % len(vectors)] = value
        return vectors

    return Vectors(change)


def wrong_width(width: int) -> Vectors:
    """Every vector has this many dimensions."""
    return Vectors(lambda vectors: np.ones((len(vectors), width), dtype=np.float32))


def reordered(change: Callable[[list[Any]], list[Any]]) -> Edit:
    """OpenAI's `data` in another order, or with other indexes."""
    return Edit(lambda answer: {**answer, "data": change(answer["data"])})


@dataclass
class Count:
    """What the server was asked for since the last `reset`."""

    requests: int = 0
    inputs: int = 0
    info: int = 0
    tokens: int = 0
    answered: int = 0
    """Requests answered properly (200 and unchanged)."""
    in_flight: int = 0
    inputs_in_flight: int = 0
    most_in_flight: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)
    """Inputs of each request."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Request bodies without their inputs."""
    authorizations: set[str | None] = field(default_factory=set)


@dataclass
class RateLimit:
    """A token bucket: `per_second` requests, `burst` at once; 429 when it is empty."""

    per_second: float
    burst: float = 1.0
    retry_after: bool = False
    headers: bool = False
    """Tell the limit as OpenAI does, in `x-ratelimit-limit-requests`."""
    level: float = field(default=-1.0, init=False)
    filled_at: float = field(default=0.0, init=False)

    def take(self, now: float) -> float:
        """0.0 when one request may pass, else the seconds until one may."""
        if self.level < 0:
            self.level, self.filled_at = self.burst, now
        self.level = min(self.burst, self.level + (now - self.filled_at) * self.per_second)
        self.filled_at = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / self.per_second


class WatchedRateLimit(RateLimit):
    """A rate limit that counts what passed, what was refused and what nobody used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.passed = self.refused = 0
        self.unused = 0.0

    def take(self, now: float) -> float:
        if self.level >= 0:
            filled = self.level + (now - self.filled_at) * self.per_second
            self.unused += max(0.0, filled - self.burst)
        wait = super().take(now)
        self.passed += wait == 0
        self.refused += wait > 0
        return wait

    def restart(self) -> None:
        self.passed, self.refused, self.unused = 0, 0, 0.0


class FaultServer:
    """A server in a thread of its own; a context manager."""

    def __init__(
        self,
        *,
        dimensions: int = 8,
        model: str = "test-model",
        info: Mapping[str, Any] | None = None,
        delay: float = 0.0,
        rate_limit: RateLimit | None = None,
        permits: int | None = None,
        api_key: str | None = None,
        port: int = 0,
    ) -> None:
        self.dimensions, self.model = dimensions, model
        self.info = {
            "model_id": model,
            "max_concurrent_requests": 512,
            "max_input_length": 512,
            "max_batch_tokens": 16384,
            "max_client_batch_size": 32,
            "auto_truncate": False,
            "version": "1.8.0",
            **(info or {}),
        }
        self.delay = delay
        self.rate_limit = rate_limit
        self.permits = permits
        """Inputs taken at once, as TEI counts; a request with more is answered 429."""
        self.api_key = api_key
        self.poison: dict[str, Status] = {}
        """Texts that are refused, also in company."""
        self.rule: Callable[[int, list[str]], Fault] | None = None
        """(number of the request from 0, its inputs) -> what to do with it."""
        self.count = Count()
        self._script: list[Fault] = []
        self._port = port
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None

    @property
    def tei_url(self) -> str:
        """Base address of the TEI dialect."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def openai_url(self) -> str:
        """Base address of the OpenAI dialect."""
        return f"http://127.0.0.1:{self._port}/v1"

    def script(self, *faults: Fault) -> None:
        """What the next requests meet, in order; None is a proper answer."""
        with self._lock:
            self._script.extend(faults)

    def reset(self) -> None:
        """Forget counts, script, rule and poison."""
        with self._lock:
            self.count = Count()
            self._script.clear()
        self.rule = None
        self.poison = {}

    def truth(self, texts: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """float32 (n, dimensions): what the texts' vectors are."""
        rows = [vector_for(text, self.dimensions, self.model) for text in texts]
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.dimensions)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen (again, on the same port, after a `stop`)."""
        listening: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        self._port = listening.result(timeout=30)

    def stop(self) -> None:
        """Close the socket and every connection, as a dead container does."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=30)
        self._thread = None

    def _run(self, listening: "Future[int]") -> None:
        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            app = web.Application(client_max_size=64 * 2**20)
            app.router.add_get("/info", self._info)
            app.router.add_post("/embed", self._embed)
            app.router.add_post("/v1/embeddings", self._embeddings)
            runner = web.AppRunner(app, shutdown_timeout=10, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", self._port)
            try:
                await site.start()
            except OSError as error:
                listening.set_exception(error)
                return
            listening.set_result(runner.addresses[0][1])
            await self._stop.wait()
            await site.stop()
            # handlers end by themselves, their connections gone: aiohttp stumbles over those that
            # it has to cancel (InvalidStateError)
            for connection in runner.server.connections if runner.server else ():
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

        asyncio.run(main())

    async def _info(self, _: web.Request) -> web.StreamResponse:
        with self._lock:
            self.count.info += 1
        return web.json_response(self.info)

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        inputs = body.pop("inputs")
        texts = [inputs] if isinstance(inputs, str) else inputs

        def proper(fault: Fault) -> Any:
            return self._vectors(texts, fault).tolist()

        def error(fault: Status) -> Any:
            return {"error": fault.words, "error_type": fault.code or "Scripted"}

        return await self._handle(request, texts, body, proper, error)

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        inputs = body.pop("input")
        texts = [inputs] if isinstance(inputs, str) else inputs

        def proper(fault: Fault) -> Any:
            def encoded(vector: np.ndarray[Any, Any]) -> Any:
                if body.get("encoding_format") == "base64":
                    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
                return vector.tolist()

            tokens = sum(map(tokens_of, texts))
            return {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": encoded(vector)}
                    for index, vector in enumerate(self._vectors(texts, fault))
                ],
                "model": fault.name if isinstance(fault, WrongModel) else self.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }

        def error(fault: Status) -> Any:
            return {"error": {"message": fault.words, "type": "scripted", "code": fault.code}}

        return await self._handle(request, texts, body, proper, error)

    def _vectors(self, texts: Sequence[str], fault: Fault) -> np.ndarray[Any, Any]:
        vectors: np.ndarray[Any, Any] = self.truth(texts)
        return fault.change(vectors) if isinstance(fault, Vectors) else vectors

    def _next_fault(self, request: web.Request, texts: list[str], body: dict[str, Any]) -> Fault:
        with self._lock:
            count, number = self.count, self.count.requests
            count.requests += 1
            count.inputs += len(texts)
            count.texts.update(texts)
            count.sizes.append(len(texts))
            count.bodies.append(body)
            count.authorizations.add(request.headers.get("authorization"))
            count.most_in_flight = max(count.most_in_flight, count.in_flight)
            has_script = bool(self._script)
            scripted = self._script.pop(0) if has_script else None
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return Status(401, words="Incorrect API key provided", code="invalid_api_key")
        if self.permits is not None and count.inputs_in_flight > self.permits:
            return Status(429, words="Model is overloaded", code="Overloaded")
        if self.rate_limit is not None:
            wait = self.rate_limit.take(time.monotonic())
            if wait > 0:
                headers = {"retry-after-ms": f"{1000 * wait:.0f}"}
                return Status(429, headers if self.rate_limit.retry_after else {}, "Too many")
        if has_script:
            return scripted
        fault = self.rule(number, texts) if self.rule is not None else None
        if fault is None:
            fault = next((self.poison[text] for text in texts if text in self.poison), None)
        return fault

    async def _handle(
        self,
        request: web.Request,
        texts: list[str],
        body: dict[str, Any],
        proper: Callable[[Fault], Any],
        error: Callable[[Status], Any],
    ) -> web.StreamResponse:
        with self._lock:
            count = self.count
            count.in_flight += 1
            count.inputs_in_flight += len(texts)
        try:
            fault = self._next_fault(request, texts, body)
            if isinstance(fault, Status):
                count.statuses[fault.status] += 1
                answer = fault.body
                if answer is None:
                    answer = json.dumps(error(fault)).encode()
                return web.Response(
                    status=fault.status,
                    headers=dict(fault.headers),
                    body=answer,
                    content_type="application/json",
                )
            if self.delay:
                await self._sleep(self.delay)
            return await self._answer(request, texts, fault, proper)
        finally:
            with self._lock:
                count.in_flight -= 1
                count.inputs_in_flight -= len(texts)

    async def _sleep(self, seconds: float) -> None:
        """Until then, or until the server stops."""
        assert self._stop is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _answer(
        self,
        request: web.Request,
        texts: list[str],
        fault: Fault,
        proper: Callable[[Fault], Any],
    ) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            return web.Response()  # the client has gone
        if isinstance(fault, Hang):
            assert self._stop is not None
            until = time.monotonic() + fault.seconds
            while time.monotonic() < until:
                if self._stop.is_set() or transport.is_closing():
                    return web.Response(status=500)
                await self._sleep(0.02)
        if isinstance(fault, Drip):
            return await self._drip(request, proper)
        if isinstance(fault, Reset):
            transport.abort()
            return web.Response()
        answer = proper(fault)
        if isinstance(fault, Edit):
            answer = fault.change(answer)
        encoded = fault.body if isinstance(fault, RawBody) else json.dumps(answer).encode()
        tokens = sum(map(tokens_of, texts))
        headers = {"x-compute-tokens": str(tokens), **self._limit_headers()}
        if isinstance(fault, HalfResponse):
            head = (
                f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(encoded)}\r\n\r\n"
            )
            transport.write(head.encode() + encoded[: len(encoded) // 2])
            transport.close()
            return web.Response()
        with self._lock:
            self.count.statuses[200] += 1
            self.count.tokens += tokens
            self.count.answered += fault is None
        return web.Response(body=encoded, content_type="application/json", headers=headers)

    async def _drip(
        self, request: web.Request, proper: Callable[[Fault], Any]
    ) -> web.StreamResponse:
        transport = request.transport
        assert self._stop is not None
        encoded = json.dumps(proper(None)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(encoded)}\r\n\r\n".encode()
        for byte in head + encoded:
            if transport is None or transport.is_closing() or self._stop.is_set():
                break
            transport.write(bytes([byte]))
            await self._sleep(0.05)
        if transport is not None:
            transport.close()
        return web.Response()

    def _limit_headers(self) -> dict[str, str]:
        limit = self.rate_limit
        if limit is None or not limit.headers:
            return {}
        return {
            "x-ratelimit-limit-requests": f"{60 * limit.per_second:.0f}",
            "x-ratelimit-remaining-requests": f"{limit.level:.0f}",
        }


def tokens_of(text: str) -> int:
    """What this server counts as the text's tokens: its words."""
    return max(1, len(text.split()))
