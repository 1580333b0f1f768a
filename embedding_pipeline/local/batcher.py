"""Requests of many clients, merged into the batches that the model runs best.

One worker thread runs the model. A request's texts need not run together: each step takes texts
of like length from whatever waits, so that little is padded, and a search query does not wait
for the 2,048 texts that came before it.
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

    @property
    def over(self) -> bool:
        return self.missing == 0 or self.future.done()


class Batcher:
    """Embeds what is submitted, in one thread of its own."""

    def __init__(self, model: MiniLM) -> None:
        self._model = model
        self._requests: list[_Request] = []  # oldest first
        self._changed = threading.Condition()
        self._stopping = False
        self._oldest_next = False
        self._requests_of: Counter[Source] = Counter()
        self._inputs_of: Counter[Source] = Counter()
        self._tokens_of: Counter[Source] = Counter()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

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
            self._changed.notify()
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
        """Stop after the running batch; what still waits is cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._requests = [request for request in self._requests if not request.over]
                while not self._requests and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    for request in self._requests:
                        request.future.cancel()
                    return
                batch = self._next_batch()
            self._run(batch)

    def _next_batch(self) -> list[tuple[_Request, int]]:
        """Texts to run next; turns go to the smallest and to the oldest request alternately.

        So one query waits for at most two steps, and no stream of small requests starves a
        large one. The rest of the batch is what comes nearest to its longest text.
        """
        waiting = [request for request in self._requests if request.waiting]
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
            failure = ModelFailureError(f"{type(error).__name__}: {error}")
            for request in {request for request, _ in batch}:
                if request.future.set_running_or_notify_cancel():
                    request.future.set_exception(failure)
            return
        with self._changed:
            for request, position in batch:
                self._inputs_of[request.source] += 1
                self._tokens_of[request.source] += len(request.tokens[position])
        for (request, position), row in zip(batch, row_of, strict=True):
            request.vectors[position] = vectors[request.source.space][row]
            request.missing -= 1
            if not request.missing and request.future.set_running_or_notify_cancel():
                request.future.set_result(request.vectors)
