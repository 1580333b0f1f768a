"""The turns that processes draw from one timeline, in virtual time."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.embedders.timeline import (
    LATE_SECONDS,
    RemoteClock,
    Turns,
    costs,
    local_start,
    per_second,
)
from embedding_pipeline.store.endpoint_budget import Limits, Reserved

CHUNK = 0.25


@dataclass
class Row:
    """The timeline, as the database keeps it."""

    free_at: float = 0.0

    def reserve(self, now: float, seconds: float) -> float:
        begins = max(self.free_at, now)
        self.free_at = begins + seconds
        return begins


@dataclass
class Process:
    """Sends whenever it has a turn, except while it is held up."""

    row: Row
    cost: float
    slower: int
    held_up: tuple[float, float] = (0.0, 0.0)
    turns: Turns = field(default_factory=lambda: Turns(CHUNK))
    next_send: float | None = None
    sent: list[float] = field(default_factory=list)

    def step(self, now: float) -> None:
        if self.held_up[0] <= now < self.held_up[1]:
            return
        while True:
            if self.next_send is not None:
                if now < self.next_send:
                    return
                self.sent.append(now)
                self.next_send = None
            if self.turns.short(now):
                seconds = self.turns.next_chunk(self.cost)
                self.turns.add(self.row.reserve(now, seconds), seconds, self.slower)
            self.next_send = self.turns.take(now, self.cost, 0.0)


def simulate(
    rate: float, processes: int, holders: int, held_up: tuple[float, float], seconds: float = 10
) -> list[float]:
    """When requests were sent, all together; the last process is held up for a while."""
    row = Row()
    started = [Process(row, 1 / per_second(int(60 * rate)), holders) for _ in range(processes)]
    started[-1].held_up = held_up
    rng = random.Random(1)
    for tick in range(int(seconds * 1000)):
        for process in rng.sample(started, len(started)):
            process.step(tick / 1000)
    return sorted(at for process in started for at in process.sent)


def most_at_once(sent: list[float], rate: float) -> float:
    """How deep a bucket of this rate must be for all of them to pass."""
    level, deepest, before = 0.0, 0.0, 0.0
    for at in sent:
        level = min(0.0, level + (at - before) * rate) - 1
        deepest, before = max(deepest, -level), at
    return deepest


@pytest.mark.parametrize("rate", [20.0, 100.0])
@pytest.mark.parametrize(("processes", "holders"), [(1, 1), (1, 3), (2, 3), (3, 3)])
def test_what_is_allowed_is_used_and_never_more_at_once(
    rate: float, processes: int, holders: int
) -> None:
    """Three processes at 100 a second: one was held up, caught up with 25 requests while the
    others had their turns, and 3 % of all requests were throttled."""
    sent = simulate(rate, processes, holders, held_up=(5.0, 5.5))
    settled = [at for at in sent if 1 <= at < 5]
    assert len(settled) == pytest.approx(4 * rate, rel=0.06)
    assert most_at_once(sent, rate) <= max(5, 0.1 * rate)


def test_what_a_process_that_was_held_up_left_is_used_by_the_others() -> None:
    sent = simulate(100, 3, 3, held_up=(3.0, 8.0))
    assert len([at for at in sent if 4 <= at < 8]) >= 0.95 * 400


def test_a_turn_is_lost_when_its_time_is_long_over_and_no_debt_is_left() -> None:
    """Three idle seconds were counted as used: a dozen reservations went by before a request."""
    turns = Turns(CHUNK)
    turns.add(10.0, 1.0, 1)
    assert turns.take(10.0, 0.1, 0.0) == 10.0
    assert turns.take(10.5, 0.1, 0.0) == 10.5
    assert turns.take(10.5, 0.1, 0.0) == pytest.approx(10.6 - LATE_SECONDS)  # one after the other
    assert turns.take(14.0, 0.1, 0.0) is None
    turns.add(14.0, 0.25, 1)
    assert turns.take(14.0, 0.1, 0.0) == 14.0


def test_what_was_drawn_beyond_the_end_is_owed() -> None:
    turns = Turns(CHUNK)
    turns.add(0.0, 0.25, 1)
    assert turns.take(0.0, 0.0, 0.4) == 0.0
    assert turns.take(0.4, 0.0, 0.1) is None
    turns.add(0.4, 0.25, 1)
    assert turns.take(0.4, 0.0, 0.1) == pytest.approx(0.4 + 0.15)


@given(st.floats(0, 0.02), st.floats(0, 0.5))
def test_a_reply_that_is_read_late_does_not_move_what_was_reserved(
    quick: float, late: float
) -> None:
    """The reply was read 130 ms after the database had sent it, and the piece began as much too
    late: in the time of the next one."""
    clock = RemoteClock()
    ahead = 1_000_000.0
    for at in (1.0, 2.0):
        local_start(clock, at, at + quick, Reserved(ahead + at, ahead + at + quick / 2, Limits()))
    reserved = Reserved(ahead + 3.0, ahead + 3.0, Limits())
    start = local_start(clock, 3.0, 3.0 + quick + late, reserved)
    assert start == pytest.approx(3.0, abs=quick / 2 + 1e-6)
    reserved = Reserved(ahead + 5.0, ahead + 4.0, Limits())
    start = local_start(clock, 4.0, 4.0 + quick + late, reserved)
    assert start == pytest.approx(5.0, abs=quick / 2 + 1e-6)


def test_a_database_clock_that_is_set_back_moves_nothing_by_more_than_the_round_trip() -> None:
    clock = RemoteClock()
    local_start(clock, 1.0, 1.001, Reserved(5000.0, 5000.0, Limits()))
    start = local_start(clock, 2.0, 2.01, Reserved(1000.5, 1000.0, Limits()))
    assert 2.5 <= start <= 2.51


def test_the_lower_of_a_given_limit_and_a_found_one_counts() -> None:
    given_limit = Limits(requests_per_minute=6000, tokens_per_minute=None)
    assert costs(given_limit, 100) == (1 / per_second(6000), 0.0)
    assert costs(given_limit, 100, found=50.0) == (1 / 50, 0.0)
    assert costs(given_limit, 100, found=500.0) == (1 / per_second(6000), 0.0)
    assert costs(Limits(None, 6000), 98, found=2.0) == (0.5, 1.0)
