"""Requests of many clients, merged into the batches that the model runs best.

A worker thread for each core runs one batch at a time. A request's texts need not run together:
each step takes texts of like length from whatever waits, so that little is padded, and a search
query does not wait for the 2,048 texts that came before it.
"""

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

import numpy as np

from embedding_pipeline.local.minilm import MiniLM, Space, Tokens, Vectors, fits


class ModelFailureError(Exception):
    """The model could not run a batch; the text is ONNX Runtime's."""


@dataclass(frozen=True)
class Source:
    """What the work is counted under."""

    dialect: str
    space: Space


@dataclass(eq=False)
class _Request:
    source: Source
    tokens: Sequence[Tokens]
    vectors: Vectors
    waiting: list[tuple[int, int]]  # (length, position), shortest first
    missing: int
    future: "Future[Vectors]" = field(default_factory=Future)

    failed: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing of it need be run any more."""
        return self.failed or self.missing == 0 or self.future.done()


class Batcher:
    """Embeds what is submitted, in as many threads of its own as the model has cores."""

    def __init__(self, model: MiniLM) -> None:
        self._model = model
        self._requests: list[_Request] = []  # oldest first
        self._changed = threading.Condition()
        self._stopping = False
        self._oldest_next = False
        self._requests_of: Counter[Source] = Counter()
        self._inputs_of: Counter[Source] = Counter()
        self._tokens_of: Counter[Source] = Counter()
        self._threads = [
            threading.Thread(target=self._work, name=f"batcher-{number}", daemon=True)
            for number in range(model.threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tokens: Sequence[Tokens], source: Source) -> "Future[Vectors]":
        """Queue texts of at most MAX_TOKENS each; cancelling the future drops what waits."""
        request = _Request(
            source=source,
            tokens=tokens,
            vectors=np.empty((len(tokens), source.space.dimensions), dtype=np.float32),
            waiting=sorted((len(ids), position) for position, ids in enumerate(tokens)),
            missing=len(tokens),
        )
        with self._changed:
            self._requests_of[source] += 1
            self._requests.append(request)
            self._changed.notify_all()
        return request.future

    def counts(self) -> dict[Source, dict[str, int]]:
        """Requests taken, and texts and tokens that the model has run, since the start."""
        with self._changed:
            return {
                source: {
                    "requests": requests,
                    "inputs": self._inputs_of[source],
                    "tokens": self._tokens_of[source],
                }
                for source, requests in self._requests_of.items()
            }

    def stop(self) -> None:
        """Stop after the running batches; what still waits is cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for request in self._requests:
            request.future.cancel()

    def _work(self) -> None:
        while (batch := self._await_batch()) is not None:
            self._run(batch)

    def _await_batch(self) -> list[tuple[_Request, int]] | None:
        """What to run next, once there is something; None when it is time to stop."""
        with self._changed:
            while not self._stopping:
                self._requests = [request for request in self._requests if not request.over]
                # the rest of the others is with another worker
                if waiting := [request for request in self._requests if request.waiting]:
                    return self._next_batch(waiting)
                self._changed.wait()
            return None

    def _next_batch(self, waiting: Sequence[_Request]) -> list[tuple[_Request, int]]:
        """Texts to run next; turns go to the smallest and to the oldest request alternately.

        So one query waits for at most two steps, and no stream of small requests starves a
        large one. The rest of the batch is what comes nearest to its longest text.
        `waiting` are the requests that have texts to run, oldest first.
        """
        self._oldest_next = not self._oldest_next
        first = waiting[0] if self._oldest_next else min(waiting, key=lambda r: len(r.waiting))
        longest = first.waiting[-1][0]
        # The longest that each request can add, and where it stands; ours comes first.
        requests = [first, *(other for other in waiting if other is not first)]
        ends = [bisect_right(r.waiting, (longest, len(r.tokens))) for r in requests]
        offers = [
            (-request.waiting[end - 1][0], number, end - 1)
            for number, (request, end) in enumerate(zip(requests, ends, strict=True))
            if end
        ]
        heapify(offers)
        starts = list(ends)
        batch: list[tuple[_Request, int]] = []
        while offers:
            length, number, at = -offers[0][0], *offers[0][1:]
            if batch and not fits(longest, len(batch), length):
                break
            request = requests[number]
            batch.append((request, request.waiting[at][1]))
            starts[number] = at
            if at:
                heapreplace(offers, (-request.waiting[at - 1][0], number, at - 1))
            else:
                heappop(offers)
        for request, start, end in zip(requests, starts, ends, strict=True):
            del request.waiting[start:end]
        return batch

    def _run(self, batch: Sequence[tuple[_Request, int]]) -> None:
        # The same text may wait for both spaces, or be asked for by two clients at once.
        rows: dict[tuple[int, ...], int] = {}
        row_of = [rows.setdefault(tuple(r.tokens[i]), len(rows)) for r, i in batch]
        spaces = list({request.source.space for request, _ in batch})
        try:
            vectors = self._model.run(list(rows), spaces)
        except Exception as error:  # noqa: BLE001  (whatever it was, the clients must hear of it)
            self._fail({request for request, _ in batch}, error)
            return
        for (request, position), row in zip(batch, row_of, strict=True):
            request.vectors[position] = vectors[request.source.space][row]
        complete = []
        with self._changed:  # another worker may be at the same requests
            for request, position in batch:
                self._inputs_of[request.source] += 1
                self._tokens_of[request.source] += len(request.tokens[position])
                request.missing -= 1
                if not request.missing and not request.failed:
                    complete.append(request)
        for request in complete:
            if request.future.set_running_or_notify_cancel():
                request.future.set_result(request.vectors)

    def _fail(self, requests: set[_Request], error: Exception) -> None:
        failure = ModelFailureError(f"{type(error).__name__}: {error}")
        with self._changed:
            first = [request for request in requests if not request.failed]
            for request in first:
                request.failed = True
        for request in first:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(failure)
