"""Texts into requests: by count, tokens and bytes, in order, nothing lost, nothing twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold."""

    inputs: int
    tokens: int
    bytes: int


class Weight(NamedTuple):
    """What one text takes of a request: tokens and bytes as JSON (either may be a bound)."""

    tokens: int
    bytes: int


def pack(weights: Sequence[Weight], limits: RequestLimits) -> list[list[int]]:
    """Split positions 0…n-1 into consecutive requests within the limits.

    A text that is over a limit by itself travels alone: whether it may is not decided here.
    """
    requests: list[list[int]] = []
    tokens = size = 0
    for position, weight in enumerate(weights):
        fits = (
            requests
            and len(requests[-1]) < limits.inputs
            and tokens + weight.tokens <= limits.tokens
            and size + weight.bytes <= limits.bytes
        )
        if fits:
            requests[-1].append(position)
            tokens, size = tokens + weight.tokens, size + weight.bytes
        else:
            requests.append([position])
            tokens, size = weight.tokens, weight.bytes
    return requests


def halves(positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two halves of at least two positions, in order."""
    middle = (len(positions) + 1) // 2
    return list(positions[:middle]), list(positions[middle:])
