"""What `dev` shows of Dagster's log."""

import pytest

from embedding_pipeline.dev_log import QUIET_SECONDS, LogView

RUN = "71f6cac5-aa8f-4c53-ba80-5c02505d2f65"
FAILED_TICK = """\
\x1b[32m2026-11-22 10:12:45 +0000\x1b[0m - dagster.daemon.SensorDaemon - ERROR - Sensor tick failed
Traceback (most recent call last):
  File "/venv/dagster/_daemon/sensor.py", line 649, in _process_tick_generator
    yield from _evaluate_sensor(
dagster._core.errors.SensorExecutionError: Error occurred for sensor docs_pending

The above exception was caused by the following exception:
dagster._core.definitions.events.Failure: there is no table docs in this database

Stack Trace:
  File "/venv/dagster/_core/errors.py", line 282, in user_code_error_boundary
    yield
""".splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"2026-11-22 09:54:03 +0000 - dagster - INFO - __ASSET_JOB - {RUN} - docs__e - "
            "docs.e: 183 rows pending in 6 of 6 partitions",
            "09:54:03  71f6cac5  docs.e: 183 rows pending in 6 of 6 partitions",
        ),
        (
            f"2026-11-22 09:54:03 +0000 - dagster - WARNING - job_x - {RUN} - docs__e - "
            "docs.e stopped early - paused",
            "09:54:03  71f6cac5  WARNING  docs.e stopped early - paused",
        ),
        (
            f"2026-11-22 09:54:03 +0000 - dagster - ERROR - __ASSET_JOB - {RUN} - 512 - docs__e - "
            'STEP_FAILURE - Execution of step "docs__e" failed.',
            '09:54:03  71f6cac5  ERROR  STEP_FAILURE - Execution of step "docs__e" failed.',
        ),
        (
            "\x1b[32m2026-11-22 09:51:01 +0000\x1b[0m - dagster.code_server - \x1b[34mERROR\x1b[0m"
            " - \x1b[31mno such module\x1b[0m",
            "09:51:01  ERROR  no such module",
        ),
        (
            "2026-11-22 10:17:36 +0000 - dagster - INFO - __repository__ - docs_pending - "
            "new partitions: acme",
            "10:17:36  docs_pending: new partitions: acme",
        ),
        ("something that another library prints\n", "something that another library prints"),
        ("", None),
    ],
)
def test_a_line_is_time_run_and_words(line: str, expected: str | None) -> None:
    assert LogView().line(line) == expected


def test_of_an_error_its_words_are_shown_and_not_the_way_through_the_code() -> None:
    view = LogView()
    shown = [view.line(line, now=0.0) for line in FAILED_TICK]
    assert [line for line in shown if line is not None] == [
        "10:12:45  ERROR  Sensor tick failed",
        "dagster._core.errors.SensorExecutionError: Error occurred for sensor docs_pending",
        "dagster._core.definitions.events.Failure: there is no table docs in this database",
    ]


def test_an_error_that_comes_with_every_tick_is_shown_once_in_ten_minutes() -> None:
    view = LogView()

    def lines(now: float) -> int:
        return sum(view.line(line, now) is not None for line in FAILED_TICK)

    assert [lines(10.0 * tick) for tick in range(4)] == [3, 0, 0, 0]
    assert lines(QUIET_SECONDS + 1) == 3


def test_what_runs_say_is_never_left_out() -> None:
    view = LogView()
    line = f"2026-11-22 09:54:03 +0000 - dagster - INFO - job - {RUN} - e - nothing is pending"
    assert view.line(line, 0.0) == view.line(line, 1.0) is not None
