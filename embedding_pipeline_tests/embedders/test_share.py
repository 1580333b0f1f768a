"""When a process has to talk to the others that share an endpoint's limits."""

from dataclasses import replace

from embedding_pipeline.embedders.found_rate import FoundRate
from embedding_pipeline.embedders.share import Share
from embedding_pipeline.store.endpoint_budget import Limits, Shared

NOBODY = Shared(0.0, 0, Limits(), {})


def synced(limits: Limits | None = None) -> Share:
    """A process that has just asked what the others hold."""
    share = Share(8, limits or Limits())
    assert share.next_task(0.0) == ("sync", 0.0)
    assert not share.has_place(), "nobody has said how many it may have"
    share.claimed(share.claim("me", NOBODY), 1, 0.0)
    return share


def test_it_asks_for_places_again_each_second() -> None:
    share = synced()
    assert share.has_place()
    assert share.next_task(0.0) == (None, 1.0)
    assert share.next_task(1.0) == ("sync", 0.0)


def test_who_is_short_of_places_asks_sooner() -> None:
    share = synced()
    while share.has_place():
        share.enter()
    assert share.in_flight == 8
    assert share.urgent
    assert share.next_task(0.0) == (None, 0.25)


def test_while_a_rate_is_looked_for_everybody_takes_part_at_once() -> None:
    """Whoever waits for no rate learns of it by asking, once a second: the others' second was
    over before it began to count."""
    share = synced()
    share.tally.take_over(FoundRate(generation=1, measuring=True), 0.0)
    assert share.next_task(0.1)[0] == "note", "what was counted before is not kept back"
    share.tally.collect(0.125, 1, None)
    assert share.next_task(0.125) == (None, 0.125)


def test_a_turn_is_reserved_before_it_is_needed_and_nothing_where_nothing_is_limited() -> None:
    free, limited = synced(), synced(Limits(requests_per_minute=600))
    assert free.turn(1, 0.0) == 0.0
    assert free.next_task(0.0)[0] is None
    assert limited.turn(1, 0.0) is None
    assert limited.next_task(0.0)[0] == "reserve"
    limited.reserved(0.0, limited.seconds_needed)
    assert limited.turn(1, 0.0) == 0.0


def test_a_throttle_is_told_within_a_tenth_of_a_second() -> None:
    share = synced()
    paced = FoundRate(per_second=10.0, generation=1)
    share.tally.take_over(paced, 0.0)
    share.tally.collect(0.0, 1, None)
    assert share.next_task(0.0) == (None, 1.0)
    assert share.tally.note(1, "throttled"), "the first one wakes the thread"
    assert not share.tally.note(1, "throttled")
    assert not share.tally.note(0, "throttled"), "sent before the rate was changed"
    assert share.next_task(0.05) == (None, 0.05)
    assert share.next_task(0.1)[0] == "note"
    told = share.tally.collect(0.1, 1, None)
    assert (told.throttled, told.seconds) == (2, 0.1)
    share.tally.take_over(replace(paced, judging=True), 0.1)
    assert share.next_task(0.2)[0] == "note", "and the judgement does not wait"
