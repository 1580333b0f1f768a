"""A process that asks an endpoint for as much as it gives, until its standard input is closed.

    python -m embedding_pipeline_tests.embedders.load '{"address": …, "database": …, …}'

Says `ready`, waits for a line, works, and ends with what it did as JSON. For tests of what
processes share, and for the benchmark.
"""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from embedding_pipeline.embedders.budget import budget_for
from embedding_pipeline.embedders.engine import ProviderEmbedder
from embedding_pipeline.embedders.limiter import Limiter, Sent
from embedding_pipeline.embedders.openai import OpenAIWire
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.tei import TeiWire
from embedding_pipeline.embedders.wire import Wire
from embedding_pipeline.shared_budget import close_all, shared_budgets

FIRST = asyncio.FIRST_COMPLETED


@dataclass(frozen=True)
class Load:
    """What to ask, and how."""

    address: str
    dialect: str = "openai"
    model: str = "test-model"
    dimensions: int = 8
    database: str | None = None
    """Limits are shared there; None: each process keeps its own."""
    concurrency: int = 32
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    inputs: int = 1
    """A request."""
    calls: int = 4
    """`embed` calls at a time."""
    texts: int | None = None
    """Ends by itself after so many."""
    adaptive: bool = True
    """False: always `concurrency` requests in flight, as a client without a limiter."""


class FixedWindow(Limiter):
    """No limiter: as many in flight as may be, whatever is answered."""

    def __init__(self, ceiling: int) -> None:
        super().__init__(ceiling)
        self.window = self.ceiling

    def succeeded(self, sent: Sent) -> None:
        self._freed.set()

    def throttled(self, sent: Sent, retry_after: float | None) -> None:
        self._freed.set()

    def failed(self, retry_after: float | None = None) -> None:
        self._freed.set()


async def work(load: Load) -> dict[str, float]:
    """Ask until standard input is closed."""
    endpoint = Endpoint(
        name="limited",
        dialect="tei" if load.dialect == "tei" else "openai",
        base_url=load.address,
        max_inputs=load.inputs,
        concurrency=load.concurrency,
        requests_per_minute=load.requests_per_minute,
        tokens_per_minute=load.tokens_per_minute,
    )
    budgets = shared_budgets(load.database) if load.database else budget_for
    wire: Wire = (TeiWire if load.dialect == "tei" else OpenAIWire)(load.model, load.dimensions)
    limiter = None if load.adaptive else FixedWindow(load.concurrency)
    embedder = ProviderEmbedder(
        endpoint, load.model, load.dimensions, wire, limiter=limiter, budgets=budgets
    )
    await embedder.start()
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    ended = loop.run_in_executor(None, sys.stdin.read)
    done: dict[str, float] = {"requests": 0, "throttled": 0, "texts": 0}
    began, cpu = time.monotonic(), time.process_time()
    number = 0

    async def ask() -> None:
        nonlocal number
        while not ended.done() and (load.texts is None or number < load.texts):
            size = 16 * load.inputs
            if load.texts is not None:
                size = min(size, load.texts - number)
            batch = [f"text number {number + i}" for i in range(size)]
            number += size
            result = await embedder.embed(batch)
            done["requests"] += result.requests
            done["throttled"] += result.throttled
            done["texts"] += int(result.done.sum())

    tasks = [asyncio.create_task(ask()) for _ in range(load.calls)]
    await asyncio.wait({asyncio.gather(*tasks, return_exceptions=True), ended}, return_when=FIRST)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    await embedder.aclose()
    done["seconds"] = time.monotonic() - began
    done["cpu_seconds"] = time.process_time() - cpu
    return done


@dataclass
class LoadProcess:
    """Such a process, from outside; a context manager."""

    load: Load
    process: "subprocess.Popen[str]" = field(init=False)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, json.dumps(asdict(self.load))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def begin(self) -> None:
        """Let it work."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Stop it, and what it did."""
        out, _ = self.process.communicate(timeout=60)
        result: dict[str, Any] = json.loads(out)
        return result

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(work(Load(**json.loads(sys.argv[1]))))), flush=True)
    close_all()
