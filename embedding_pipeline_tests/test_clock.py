"""Times of day and time zones, as settings and YAML write them."""

from datetime import UTC, datetime

import pytest

from embedding_pipeline.clock import cron, next_time, time_of_day, time_zone


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize(
    ("now", "zone", "expected"),
    [
        ("2026-11-22T01:59:59+00:00", "UTC", "2026-11-22T02:00:00+00:00"),
        ("2026-11-22T02:00:00+00:00", "UTC", "2026-11-23T02:00:00+00:00"),
        ("2026-11-22T23:30:00+00:00", "Europe/Madrid", "2026-11-23T01:00:00+00:00"),
        ("2026-11-22T01:30:00+00:00", "Asia/Tokyo", "2026-11-22T17:00:00+00:00"),
        # the clocks change in the night between
        ("2026-10-24T12:00:00+00:00", "Europe/Madrid", "2026-10-25T00:00:00+00:00"),
        ("2026-10-25T12:00:00+00:00", "Europe/Madrid", "2026-10-26T01:00:00+00:00"),
    ],
)
def test_when_it_comes_next(now: str, zone: str, expected: str) -> None:
    assert next_time("02:00", zone, at(now)).astimezone(UTC) == at(expected)


def test_cron_is_daily_at_that_time() -> None:
    assert cron("02:00") == "0 2 * * *"
    assert cron("23:05") == "5 23 * * *"


@pytest.mark.parametrize("wrong", ["2:00", "24:00", "12:60", "noon", "", 810, None, "02:00 "])
def test_what_is_no_time_of_day(wrong: object) -> None:
    with pytest.raises(ValueError, match="in quotes"):
        time_of_day(wrong)


def test_a_place_is_answered_with_its_zone() -> None:
    assert time_zone("Europe/Madrid") == "Europe/Madrid"
    with pytest.raises(ValueError, match="Europe/Madrid"):
        time_zone("Spain/Madrid")
    with pytest.raises(ValueError, match="America/Argentina/Buenos_Aires"):
        time_zone("Buenos Aires")
