"""What the tests of the embedders share: embedders of a fault server, time that stands still."""

import asyncio
import random
import selectors
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from embedding_pipeline.embedders.budget import TokenBucket
from embedding_pipeline.embedders.engine import ProviderEmbedder
from embedding_pipeline.embedders.limiter import Limiter
from embedding_pipeline.embedders.openai import OpenAIWire
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.tei import TeiWire
from embedding_pipeline.embedders.tokens import TokenCounter
from embedding_pipeline.embedders.wire import Wire
from embedding_pipeline_tests.faults.server import FaultServer

T = TypeVar("T")
Dialect = Literal["tei", "openai"]
DIALECTS: tuple[Dialect, ...] = ("tei", "openai")


class FakeTime:
    """A clock that only sleeping moves, and a sleep that returns at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def endpoint_of(server: FaultServer, dialect: Dialect = "tei", **changes: Any) -> Endpoint:
    """The server as an endpoint of one dialect."""
    settings: dict[str, Any] = {
        "max_inputs": 32,
        "max_tokens_per_input": 512,
        "concurrency": 4,
        "timeout_seconds": 20.0,
        "give_up_after_seconds": 120.0,
        **changes,
    }
    url = server.tei_url if dialect == "tei" else server.openai_url
    return Endpoint(name=f"test-{dialect}", dialect=dialect, base_url=url, **settings)


def embedder_of(
    endpoint: Endpoint, server: FaultServer, time: FakeTime | None = None, **options: Any
) -> ProviderEmbedder:
    """An embedder with limiter and budget of its own, on fake time; counts tokens by estimate."""
    time = time or FakeTime()
    dimensions = options.pop("dimensions", server.dimensions)
    model = options.pop("model", server.model)
    wire: Wire = (TeiWire if endpoint.dialect == "tei" else OpenAIWire)(model, dimensions)
    return ProviderEmbedder(
        endpoint,
        model,
        dimensions,
        wire,
        limiter=Limiter(endpoint.concurrency, sleep=time.sleep, clock=time.clock),
        budget=TokenBucket(
            endpoint.requests_per_minute,
            endpoint.tokens_per_minute,
            sleep=time.sleep,
            clock=time.clock,
        ),
        counter=options.pop("counter", TokenCounter(None, special_tokens=2)),
        sleep=time.sleep,
        clock=time.clock,
        rng=random.Random(0),
        **options,
    )


def texts(count: int, prefix: str = "text") -> list[str]:
    """Different short texts."""
    return [f"{prefix} number {i}" for i in range(count)]


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting for a timer takes no time, and `time()` moves as if it did."""

    def __init__(self) -> None:
        self.virtual_now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.virtual_now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self._loop.virtual_now += timeout
        return ready


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` without the waiting; for code that talks to nobody outside the process."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
