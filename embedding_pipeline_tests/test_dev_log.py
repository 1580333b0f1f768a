"""What `dev` shows of Dagster's log."""

import pytest

from embedding_pipeline.dev_log import shown

RUN = "71f6cac5-aa8f-4c53-ba80-5c02505d2f65"


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
        ('  File "x.py", line 3, in f\n', '  File "x.py", line 3, in f'),
        ("", ""),
    ],
)
def test_a_line_is_time_run_and_words(line: str, expected: str) -> None:
    assert shown(line) == expected
