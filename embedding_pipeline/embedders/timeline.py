"""An endpoint's timeline: pieces of it that a process reserved, and what a request takes of it."""

from embedding_pipeline.embedders.budget import SHARE
from embedding_pipeline.store.endpoint_budget import Limits


class Block:
    """A reserved piece of the endpoint's timeline, and how far it is used up (seconds)."""

    def __init__(self, start: float, seconds: float) -> None:
        self.start, self.seconds = start, seconds
        self.requests = self.tokens = 0.0

    @property
    def position(self) -> float:
        return max(0.0, self.requests, self.tokens)

    def pass_time(self, now: float, late: float) -> None:
        """What was not used in time is lost; so many seconds are still in time."""
        passed = now - self.start - late
        self.requests, self.tokens = max(self.requests, passed), max(self.tokens, passed)


def per_second(per_minute: int) -> float:
    return SHARE * per_minute / 60


def costs(limits: Limits, tokens: int) -> tuple[float, float]:
    """Seconds of the timeline that one request takes, by requests and by tokens."""
    requests, by_token = limits.requests_per_minute, limits.tokens_per_minute
    return (
        1 / per_second(requests) if requests else 0.0,
        tokens / per_second(by_token) if by_token else 0.0,
    )
