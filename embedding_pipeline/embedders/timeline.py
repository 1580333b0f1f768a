"""An endpoint's timeline: pieces of it that a process reserved, and the turns that they give.

A piece of a quarter of a second is a quarter of a second's worth of requests. With n processes
each plays its pieces n times slower, so that all of them ask at the same time, each for its share,
instead of one after the other at full speed: one that is held up (its event loop, the machine)
has a third of the requests to catch up with, and none of the others runs into it.
"""

from collections import deque

from embedding_pipeline.embedders.budget import SHARE
from embedding_pipeline.store.endpoint_budget import Limits, Reserved

LATE_SECONDS = 0.07
"""How long a turn may be used after its time. Limited endpoints bear a tenth of a second's worth at
once, not much more; what is later is lost."""
REMEMBERED_TRIPS = 16


class RemoteClock:
    """What another clock shows, by round trips; the quickest of the last ones tells it best.

    A reply may be read 100 ms after it was sent, on a machine that is busy: pieces that begin by
    the time of reading overlap.
    """

    def __init__(self) -> None:
        self._trips: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_TRIPS)

    def note(self, sent: float, received: float, shown: float) -> None:
        """It showed this at some time between the two."""
        self._trips.append((received - sent, (sent + received) / 2 - shown))

    def here(self, shown: float) -> float:
        """When it shows this, by our own clock."""
        return shown + min(self._trips)[1]


class Block:
    """A reserved piece of the timeline, and how far it is used up (seconds of the timeline)."""

    def __init__(self, start: float, seconds: float, slower: int = 1) -> None:
        self.start, self.seconds, self.slower = start, seconds, slower
        self.requests = self.tokens = 0.0

    @property
    def position(self) -> float:
        return max(0.0, self.requests, self.tokens)

    @property
    def due(self) -> float:
        """When its next turn is."""
        return self.start + self.position * self.slower

    def pass_time(self, now: float) -> None:
        """What was not used in time is lost, and nothing beyond its end."""
        passed = min(self.seconds, (now - self.start - LATE_SECONDS) / self.slower)
        self.requests, self.tokens = max(self.requests, passed), max(self.tokens, passed)

    def unused(self, now: float) -> bool:
        """It has ended by itself."""
        return now - self.start - LATE_SECONDS >= self.seconds * self.slower


class Turns:
    """The turns of one process."""

    def __init__(self, chunk: float) -> None:
        self._most = chunk
        self._chunk = 0.0
        self._blocks: deque[Block] = deque()
        self._overdrawn = (0.0, 0.0)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._chunk, self._overdrawn = 0.0, (0.0, 0.0)

    def add(self, start: float, seconds: float, slower: int) -> None:
        """Something was reserved."""
        block = Block(start, seconds, slower)
        block.requests, block.tokens = self._overdrawn
        self._overdrawn = (0.0, 0.0)
        self._blocks.append(block)

    def take(self, now: float, requests: float, tokens: float) -> float | None:
        """When a request that takes so many seconds may be sent; None: reserve some first."""
        for block in list(self._blocks):
            block.pass_time(now)
            if block.position >= block.seconds:
                self._end(block, now)
        if not self._blocks:
            return None
        block = min(self._blocks, key=lambda each: each.due)
        due = block.due
        block.requests += requests
        block.tokens += tokens
        return max(now, due)

    def short(self, now: float) -> bool:
        """Whether it is time to reserve more: half of what was reserved last is over."""
        if not self._blocks:
            return True
        last = self._blocks[-1]
        return now >= last.start + last.seconds / 2 or last.position >= last.seconds / 2

    def next_chunk(self, seconds: float) -> float:
        """How much to reserve, for a request that takes so many seconds: each time twice as much,
        as long as it is used."""
        self._chunk = min(self._most, max(seconds, 2 * self._chunk))
        return max(seconds, self._chunk)

    def correct_tokens(self, seconds: float) -> None:
        """A request took so much more of the timeline than was thought, or less."""
        if self._blocks:
            self._blocks[0].tokens += seconds

    def _end(self, block: Block, now: float) -> None:
        """What was drawn beyond a block's end is owed to the next one."""
        self._blocks.remove(block)
        if block.unused(now):
            self._chunk = 0.0  # too much was reserved
        over = (max(0.0, block.requests - block.seconds), max(0.0, block.tokens - block.seconds))
        if self._blocks:
            self._blocks[0].requests += over[0]
            self._blocks[0].tokens += over[1]
        else:
            self._overdrawn = (self._overdrawn[0] + over[0], self._overdrawn[1] + over[1])


def local_start(clock: RemoteClock, sent: float, received: float, reserved: Reserved) -> float:
    """When what was reserved in this round trip begins, by our own clock."""
    clock.note(sent, received, reserved.now)
    begins_in = max(0.0, reserved.begins - reserved.now)
    return min(received + begins_in, max(sent + begins_in, clock.here(reserved.begins)))


def per_second(per_minute: int) -> float:
    return SHARE * per_minute / 60


def costs(limits: Limits, tokens: int, found: float | None = None) -> tuple[float, float]:
    """Seconds of the timeline that one request takes, by requests and by tokens.

    `found`: requests a second, where throttles have shown that no more pass.
    """
    requests, by_token = limits.requests_per_minute, limits.tokens_per_minute
    rates = [per_second(requests)] if requests else []
    if found is not None:
        rates.append(found)
    return (
        1 / min(rates) if rates else 0.0,
        tokens / per_second(by_token) if by_token else 0.0,
    )
