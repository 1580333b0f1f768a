"""One `embed` call on its way: what is done of it, whether it goes on, what has failed so far."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from embedding_pipeline.embedders.errors import EmbedError
from embedding_pipeline.embedders.inputs import Inputs
from embedding_pipeline.embedders.port import EmbedResult, MayRepeat
from embedding_pipeline.embedders.responses import Answer


@dataclass
class Job:
    """One `embed` call."""

    inputs: Inputs
    result: EmbedResult
    retry: bool
    stopped: "asyncio.Future[None]"
    error: EmbedError | None = None
    may_repeat: MayRepeat | None = None

    def stop(self, error: EmbedError) -> None:
        """The first error is the call's; nothing more is sent."""
        if self.error is None:
            self.error = error
            self.stopped.set_result(None)

    def take(self, indices: list[int], answer: Answer) -> None:
        """An answer to these inputs. One to all of them is the result as it is, without a copy."""
        result = self.result
        if len(indices) == len(result.done):
            result.vectors = answer.vectors
        else:
            if not result.vectors.flags.writeable:
                result.vectors = result.vectors.copy()
            result.vectors[indices] = answer.vectors
        result.done[indices] = True

    async def sleep(self, waiting: Awaitable[None]) -> None:
        """Wait, but no longer than the call goes on."""
        task = asyncio.ensure_future(waiting)
        try:
            await self.first_of(task)
        finally:
            task.cancel()

    async def first_of(self, task: "asyncio.Future[Any]") -> None:
        """Wait until the task is done or the call has ended."""
        waited_for: set[asyncio.Future[Any]] = {task, self.stopped}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)


@dataclass
class History:
    """What has failed so far of a request, or of the one that it is a part of."""

    failures: int = 0
    answered_before: int = 0
    is_part: bool = False
