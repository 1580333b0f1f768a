"""Where the time from a commit to a searchable row goes, by what Dagster records of its run."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import psycopg

from benchmarks.report import Cell

STEPS = ("tick due, s", "tick, s", "queue, s", "process start, s", "embedding, s")
"""One after the other: until the sensor looks, until it has requested a run, until the run leaves
the queue, until its process executes it, until search finds the row."""

UNFINISHED = """
    SELECT count(*) FROM dagster.runs
    WHERE status IN ('QUEUED', 'NOT_STARTED', 'STARTING', 'STARTED', 'CANCELING')
"""

# a tick that asked for nothing is SKIPPED; the timestamps of Dagster's tables are UTC without zone
_RUN = """
    SELECT (SELECT max(tick.timestamp) FROM dagster.job_ticks AS tick
            WHERE tick.status = 'SUCCESS' AND tick.timestamp <= runs.create_timestamp),
        runs.create_timestamp,
        (SELECT min(event.timestamp) FROM dagster.event_logs AS event
            WHERE event.run_id = runs.run_id AND dagster_event_type = 'PIPELINE_STARTING'),
        (SELECT min(event.timestamp) FROM dagster.event_logs AS event
            WHERE event.run_id = runs.run_id AND dagster_event_type = 'PIPELINE_START')
    FROM dagster.runs
    WHERE create_timestamp BETWEEN $1 AND $2 AND EXISTS (
        SELECT FROM dagster.run_tags AS tag
        WHERE tag.run_id = runs.run_id AND tag.key = 'embedding_pipeline/column')
    ORDER BY create_timestamp LIMIT 1
"""


def steps_of(
    connection: "psycopg.Connection[Any]", committed: datetime, found: datetime
) -> list[float] | None:
    """Seconds of each of STEPS; None where a run that was going already took the row along."""
    row = connection.execute(_RUN.encode(), [committed, found]).fetchone()
    if row is None or None in row:
        return None
    # a tick that had begun before the commit and saw it took no waiting
    times = [committed, max(committed, row[0]), *row[1:], found]
    return [(later - earlier).total_seconds() for earlier, later in pairwise(times)]


def step_cells(steps: Sequence[list[float]]) -> dict[str, Cell]:
    """The median of each step."""
    if not steps:
        return dict.fromkeys(STEPS, "–")
    return dict(zip(STEPS, map(float, np.median(np.array(steps), axis=0)), strict=True))
