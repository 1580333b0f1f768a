"""How commands print."""

import io

import pytest
from rich.console import Console

from embedding_pipeline.backfill import Progress
from embedding_pipeline.cli import output


def test_progress_elsewhere_than_on_a_terminal_is_a_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first line said 0 rows at 0 rows/s, at once."""
    now = 1000.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    written = io.StringIO()
    with output.Bar(Console(file=written, width=200), "docs.embedding") as bar:
        bar.start(300)
        for now in (1000.5, 1004.0, 1006.0, 1007.0, 1012.0):
            bar.update(Progress(int(10 * (now - 1000)), 10.0, 100, 10.0))
    lines = written.getvalue().splitlines()
    assert lines[0] == "docs.embedding: 300 rows pending"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "docs.embedding: 60 rows",
        "docs.embedding: 120 rows",
    ]


def test_a_long_build_that_only_counts_on_is_a_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    written = io.StringIO()
    lines = output.Lines(Console(file=written, width=200))
    said = ["build it", "loading, 10 %", "waiting for pid 7", "loading, 20 %", "loading, 30 %"]
    for clock[0], line in zip((1000.0, 1001.0, 1002.0, 1006.0, 1008.0), said, strict=True):
        lines(line)
    assert written.getvalue().splitlines() == ["build it", "waiting for pid 7", "loading, 30 %"]
