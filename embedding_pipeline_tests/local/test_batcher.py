"""Requests share batches, and none waits for all that came before it."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest

from embedding_pipeline.local.batcher import Batcher, ModelFailureError, Source
from embedding_pipeline.local.minilm import BATCH_TOKENS, MiniLM, Space, Tokens, Vectors
from embedding_pipeline_tests.local.processes import eventually

NARROW = Source("tei", Space.LAST_LAYER)
WIDE = Source("openai", Space.LAYERS)


class HeldModel(MiniLM):
    """Records the batches; holds each until `let` is called, so that order is no chance.

    Its vectors say which text they are of: every entry is the text's first token.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.batches: list[list[Tokens]] = []
        self.spaces: list[list[Space]] = []
        self.arrived = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self.failing = False

    def run(self, tokens: Sequence[Tokens], spaces: Sequence[Space]) -> dict[Space, Vectors]:
        self.batches.append(list(tokens))
        self.spaces.append(list(spaces))
        self.arrived.release()
        assert self._go.acquire(timeout=30)
        if self.failing:
            raise RuntimeError("out of memory")
        firsts = np.array([[ids[0]] for ids in tokens], dtype=np.float32)
        return {space: np.repeat(firsts, space.dimensions, axis=1) for space in spaces}

    def await_batch(self) -> None:
        """Wait until the next batch has reached the model."""
        assert self.arrived.acquire(timeout=30)

    def let(self, number: int) -> None:
        """Let so many batches through."""
        self._go.release(number)


@pytest.fixture
def held() -> HeldModel:
    return HeldModel()


@pytest.fixture
def batcher(held: HeldModel) -> Iterator[Batcher]:
    batcher = Batcher(held)
    yield batcher
    held.let(1000)
    batcher.stop()


def texts(length: int, *firsts: int) -> list[list[int]]:
    return [[first] * length for first in firsts]


def test_what_waits_is_merged_across_requests_and_each_gets_its_own_rows(
    held: HeldModel, batcher: Batcher
) -> None:
    first = batcher.submit(texts(10, 1), NARROW)
    held.await_batch()
    others = [batcher.submit(texts(10, n, n + 1), NARROW) for n in (10, 20, 30)]
    held.let(2)
    assert first.result(30)[:, 0].tolist() == [1]
    assert [other.result(30)[:, 0].tolist() for other in others] == [[10, 11], [20, 21], [30, 31]]
    assert len(held.batches) == 2
    assert len(held.batches[1]) == 6


def test_both_spaces_share_a_pass_and_an_equal_text_is_run_once(
    held: HeldModel, batcher: Batcher
) -> None:
    batcher.submit(texts(10, 1), NARROW)
    held.await_batch()
    narrow = batcher.submit(texts(10, 5, 6), NARROW)
    wide = batcher.submit(texts(10, 5, 6), WIDE)
    held.let(2)
    assert narrow.result(30).shape == (2, 384)
    assert wide.result(30).shape == (2, 1536)
    assert len(held.batches[1]) == 2
    assert set(held.spaces[1]) == {Space.LAST_LAYER, Space.LAYERS}


def test_a_query_waits_for_two_steps_at_most_behind_a_large_request(
    held: HeldModel, batcher: Batcher
) -> None:
    large = batcher.submit(texts(200, *range(1, 101)), WIDE)
    held.await_batch()
    query = batcher.submit(texts(5, 1000), NARROW)
    held.let(3)
    assert query.result(30)[0, 0] == 1000
    assert not large.done()
    held.let(1000)
    assert large.result(30)[:, 0].tolist() == list(range(1, 101))


def test_a_stream_of_small_requests_does_not_starve_a_large_one(
    held: HeldModel, batcher: Batcher
) -> None:
    steps = -(-20 // (BATCH_TOKENS // 200))
    large = batcher.submit(texts(200, *range(1, 21)), NARROW)
    held.await_batch()
    for number in range(2 * steps + 2):
        batcher.submit(texts(5, 1000 + number), NARROW)
        held.let(1)
        held.await_batch()
    assert large.done()


def test_texts_of_like_length_run_together_whatever_request_they_are_of(
    held: HeldModel, batcher: Batcher
) -> None:
    batcher.submit(texts(10, 1), NARROW)
    held.await_batch()
    one = batcher.submit([*texts(200, 2), *texts(20, 3)], NARROW)
    two = batcher.submit([*texts(200, 4), *texts(20, 5)], NARROW)
    held.let(1000)
    one.result(30)
    two.result(30)
    together = [sorted(ids[0] for ids in batch) for batch in held.batches]
    assert together == [[1], [2, 4], [3, 5]]


def test_a_cancelled_request_costs_no_further_batch(held: HeldModel, batcher: Batcher) -> None:
    large = batcher.submit(texts(200, *range(1, 101)), NARROW)
    held.await_batch()
    large.cancel()
    query = batcher.submit(texts(5, 1000), NARROW)
    held.let(2)
    query.result(30)
    assert [ids[0] for ids in held.batches[1]] == [1000]
    assert batcher.counts()[NARROW]["inputs"] == len(held.batches[0]) + 1


def test_a_failing_model_is_an_error_for_those_in_the_batch_and_the_next_works(
    held: HeldModel, batcher: Batcher
) -> None:
    held.failing = True
    future = batcher.submit(texts(10, 1), NARROW)
    held.await_batch()
    held.let(1)
    with pytest.raises(ModelFailureError, match="out of memory"):
        future.result(30)
    held.failing = False
    held.let(1)
    assert batcher.submit(texts(10, 2), NARROW).result(30)[0, 0] == 2


@pytest.fixture
def two_cores() -> Iterator[tuple[HeldModel, Batcher]]:
    """A model that runs two batches at once, and its batcher."""
    held = HeldModel(threads=2)
    batcher = Batcher(held)
    yield held, batcher
    held.let(1000)
    batcher.stop()


def test_one_request_is_run_by_every_core(two_cores: tuple[HeldModel, Batcher]) -> None:
    held, batcher = two_cores
    large = batcher.submit(texts(200, *range(1, 101)), NARROW)
    held.await_batch()
    held.await_batch()  # the second is with the model before the first is through
    held.let(1000)
    assert large.result(30)[:, 0].tolist() == list(range(1, 101))
    assert batcher.counts()[NARROW]["inputs"] == 100


def test_a_request_that_fails_on_two_cores_at_once_fails_once_and_both_go_on(
    two_cores: tuple[HeldModel, Batcher],
) -> None:
    held, batcher = two_cores
    held.failing = True
    large = batcher.submit(texts(200, *range(1, 101)), NARROW)
    held.await_batch()
    held.await_batch()
    held.let(2)
    with pytest.raises(ModelFailureError, match="out of memory"):
        large.result(30)
    held.failing = False
    others = [batcher.submit(texts(10, number), NARROW) for number in (1, 2)]
    held.let(1000)
    assert [other.result(30)[0, 0] for other in others] == [1, 2]
    # nothing of the failed request was run later, and both threads are still there
    one = batcher.submit(texts(200, *range(1, 101)), NARROW)
    assert one.result(30).shape == (100, 384)
    assert len(held.batches) <= 2 + 2 + 50
    assert all(thread.is_alive() for thread in batcher._threads)


def test_counts_are_what_the_model_ran(held: HeldModel, batcher: Batcher) -> None:
    held.let(1000)
    batcher.submit(texts(10, 1, 2), NARROW).result(30)
    batcher.submit(texts(7, 3), WIDE).result(30)
    assert batcher.counts() == {
        NARROW: {"requests": 1, "inputs": 2, "tokens": 20},
        WIDE: {"requests": 1, "inputs": 1, "tokens": 7},
    }


def test_stopping_cancels_what_waits(held: HeldModel) -> None:
    batcher = Batcher(held)
    batcher.submit(texts(10, 1), NARROW)
    held.await_batch()
    waiting = batcher.submit(texts(10, 2), NARROW)
    stopper = threading.Thread(target=batcher.stop)
    stopper.start()
    eventually(lambda: batcher._stopping, "the batcher hears of it")
    held.let(1000)
    stopper.join(30)
    with pytest.raises(CancelledError):
        waiting.result(1)
