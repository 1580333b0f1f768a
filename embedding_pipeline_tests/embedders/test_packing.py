"""Packing: within the limits, in order, nothing lost, nothing twice."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.embedders.packing import RequestLimits, Weight, halves, pack

weights = st.lists(
    st.builds(Weight, tokens=st.integers(1, 400), bytes=st.integers(1, 4000)), max_size=200
)
limits = st.builds(
    RequestLimits,
    inputs=st.integers(1, 64),
    tokens=st.integers(1, 2000),
    bytes=st.integers(1, 20_000),
)


@given(weights, limits)
def test_every_text_is_in_one_request_and_in_order(
    weights: list[Weight], limits: RequestLimits
) -> None:
    flat = [position for request in pack(weights, limits) for position in request]
    assert flat == list(range(len(weights)))


@given(weights, limits)
def test_a_request_of_several_texts_is_within_every_limit(
    weights: list[Weight], limits: RequestLimits
) -> None:
    for request in pack(weights, limits):
        assert request
        if len(request) > 1:
            assert len(request) <= limits.inputs
            assert sum(weights[p].tokens for p in request) <= limits.tokens
            assert sum(weights[p].bytes for p in request) <= limits.bytes


@given(weights, limits)
def test_no_request_could_have_taken_the_next_one_in(
    weights: list[Weight], limits: RequestLimits
) -> None:
    requests = pack(weights, limits)
    for request, following in pairwise(requests):
        together = [weights[p] for p in (*request, following[0])]
        assert (
            len(together) > limits.inputs
            or sum(w.tokens for w in together) > limits.tokens
            or sum(w.bytes for w in together) > limits.bytes
        )


@given(st.lists(st.integers(), min_size=2, max_size=300))
def test_halves_are_two_and_reach_single_texts_in_log2_steps(positions: list[int]) -> None:
    left, right = halves(positions)
    assert left + right == positions
    assert 0 <= len(left) - len(right) <= 1
    assert right
    steps, part = 0, positions
    while len(part) > 1:
        part, steps = halves(part)[0], steps + 1
    assert steps == math.ceil(math.log2(len(positions)))
