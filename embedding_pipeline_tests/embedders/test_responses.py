"""What the headers of an answer mean."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from embedding_pipeline.embedders.responses import retry_after


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500"}, 1.5),
        # the finer one wins, unless nobody can read it
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_seconds_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize("hours", [1, -1])
def test_a_date_to_wait_for(hours: int) -> None:
    """RFC 9110 allows a date, and gateways send one."""
    at = (datetime.now(UTC) + timedelta(hours=hours)).replace(microsecond=0)
    before = time.time()
    found = retry_after({"retry-after": format_datetime(at, usegmt=True)})
    after = time.time()
    assert found is not None
    assert max(0.0, at.timestamp() - after) <= found <= max(0.0, at.timestamp() - before)
