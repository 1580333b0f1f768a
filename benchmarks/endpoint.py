"""An embedding endpoint that is faster than whatever is measured against it.

    python -m benchmarks.endpoint --dimensions 1536 [--latency 0.25] [--per-second 20]

It speaks OpenAI's dialect (`POST /v1/embeddings`, base64 or numbers) and TEI's (`POST /embed`,
`GET /info`) on loopback, in a process of its own, over a bare asyncio protocol. Answers are put
together from precomputed pieces: the vector of a text is `corpus.vector_of(text)`, of which all
but the first values is one of 1,024 strings. `GET /counts` tells what it was asked for since the
last `POST /counts`.
"""

import argparse
import asyncio
import base64
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic_core import from_json

from benchmarks import corpus

ROOT = Path(__file__).resolve().parents[1]
MODEL_OPENAI = "text-embedding-3-small"
MODEL_TEI = "sentence-transformers/all-MiniLM-L6-v2"

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


@dataclass
class Counts:
    """What an endpoint was asked for."""

    requests: int = 0
    inputs: int = 0
    refused: int = 0
    most_in_flight: int = 0
    wrong: int = 0
    """Vectors that it spoiled because it was told to (`--spoil`)."""


class Payloads:
    """Answers, put together from precomputed pieces."""

    def __init__(self, dimensions: int) -> None:
        bases = corpus.bases(dimensions)
        self.dimensions = dimensions
        tails = bases[:, corpus.OWN_VALUES :].astype("<f4")
        self._base64 = [base64.b64encode(tail.tobytes()) for tail in tails]
        # the shortest decimals that come back as the same float32
        self._numbers = [",".join(map(str, tail)).encode() for tail in tails]

    def encoded(self, data: bytes) -> bytes:
        own = base64.b64encode(corpus.own_values(data).astype("<f4").tobytes())
        return own + self._base64[corpus.base_of(data)]

    def numbers(self, data: bytes) -> bytes:
        own = ",".join(map(str, corpus.own_values(data))).encode()
        return b"[" + own + b"," + self._numbers[corpus.base_of(data)] + b"]"

    def openai(self, texts: Sequence[bytes], model: str, *, as_base64: bool) -> bytes:
        parts = []
        for index, data in enumerate(texts):
            value = b'"' + self.encoded(data) + b'"' if as_base64 else self.numbers(data)
            parts.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value))
        tokens = sum(len(data) for data in texts) // 4 + 1
        return (
            b'{"object":"list","data":[%b],"model":"%b","usage":{"prompt_tokens":%d,'
            b'"total_tokens":%d}}' % (b",".join(parts), model.encode(), tokens, tokens)
        )

    def tei(self, texts: Sequence[bytes]) -> bytes:
        return b"[" + b",".join(map(self.numbers, texts)) + b"]"


@dataclass
class Server:
    """The endpoint's state, shared by its connections."""

    payloads: Payloads
    latency: float
    per_second: float | None
    spoil: int
    counts: Counts
    in_flight: int = 0
    level: float = 1.0
    filled_at: float = 0.0

    def admits(self) -> bool:
        """A token bucket of `per_second` with a tenth of a second's worth at once."""
        if self.per_second is None:
            return True
        now = time.monotonic()
        burst = max(1.0, self.per_second / 10)
        self.level = min(burst, self.level + (now - self.filled_at) * self.per_second)
        self.filled_at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True

    def answer(self, path: bytes, body: bytes) -> bytes:
        """The whole answer to one embedding request."""
        asked = from_json(body)
        inputs = asked["input" if path != b"/embed" else "inputs"]
        texts = [item.encode() for item in ([inputs] if isinstance(inputs, str) else inputs)]
        self.counts.inputs += len(texts)
        if self.spoil and self.counts.inputs >= self.spoil:
            # one text gets the vector of another: what a check must find
            texts[0] = b"spoilt " + texts[0]
            self.counts.wrong += 1
            self.spoil = 0
        if path == b"/embed":
            return self.payloads.tei(texts)
        as_base64 = asked.get("encoding_format") == "base64"
        return self.payloads.openai(texts, asked["model"], as_base64=as_base64)

    def small(self, method: bytes, path: bytes) -> bytes | None:
        """The answer to anything else."""
        if path == b"/info":
            return json.dumps(
                {
                    "model_id": MODEL_TEI,
                    "max_concurrent_requests": 100_000,
                    "max_input_length": 512,
                    "max_client_batch_size": 2048,
                    "version": "1.8.0",
                }
            ).encode()
        if path == b"/counts":
            said = json.dumps(asdict(self.counts)).encode()
            if method == b"POST":
                self.counts = Counts()
            return said
        return b"{}" if path == b"/health" else None


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive; a request at a time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end])
            found = _LENGTH.search(head)
            length = int(found[1]) if found else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = bytes(self.buffer[end + 4 : end + 4 + length])
            del self.buffer[: end + 4 + length]
            method, path, _ = head.split(b" ", 2)
            self.take(method, path, body)

    def take(self, method: bytes, path: bytes, body: bytes) -> None:
        """Answer one request, after the latency."""
        server, counts = self.server, self.server.counts
        if path not in (b"/embed", b"/v1/embeddings"):
            said = server.small(method, path)
            self.send(b"404 Not Found" if said is None else b"200 OK", said or b"{}")
            return
        counts.requests += 1
        if not server.admits():
            counts.refused += 1
            self.send(b"429 Too Many Requests", b'{"error":{"message":"too many requests"}}')
            return
        server.in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, server.in_flight)
        began = time.monotonic()
        answer = server.answer(path, body)
        if server.latency:
            # what putting the answer together took is part of the latency
            wait = server.latency - (time.monotonic() - began)
            asyncio.get_running_loop().call_later(max(0.0, wait), self.finish, answer)
        else:
            self.finish(answer)

    def finish(self, answer: bytes) -> None:
        self.server.in_flight -= 1
        self.send(b"200 OK", answer)

    def send(self, status: bytes, body: bytes) -> None:
        transport = self.transport
        if transport is not None and not transport.is_closing():
            head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            transport.write(head % (status, len(body)))
            transport.write(body)


@dataclass
class Endpoint:
    """Such a process, from outside; a context manager."""

    dimensions: int = 1536
    latency: float = 0.0
    per_second: float | None = None
    spoil: int = 0
    """Give the so-and-so-manieth text another text's vector, once."""
    url: str = ""
    _process: "subprocess.Popen[str] | None" = None

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __spec__.name, "--dimensions", str(self.dimensions)]
        command += ["--latency", str(self.latency), "--spoil", str(self.spoil)]
        if self.per_second is not None:
            command += ["--per-second", str(self.per_second)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"the endpoint did not start: {' '.join(command)}")
        return self

    def counts(self, *, reset: bool = False) -> dict[str, int]:
        """What it was asked for since the last reset."""
        request = urllib.request.Request(
            f"{self.url}/counts", method="POST" if reset else "GET", data=b"" if reset else None
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            counts: dict[str, int] = json.load(answer)
        return counts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


async def serve(options: argparse.Namespace) -> None:
    """Serve until standard input is closed, so that it never outlives who started it."""
    server = Server(
        Payloads(options.dimensions), options.latency, options.per_second, options.spoil, Counts()
    )
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", options.port)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    listening.close()


def main(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endpoint", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dimensions", type=int, default=1536)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--per-second", type=float, help="requests; 429 beyond (default: no limit)")
    parser.add_argument("--spoil", type=int, default=0, help="give the n-th text a wrong vector")
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
