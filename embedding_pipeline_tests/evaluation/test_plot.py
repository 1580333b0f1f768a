"""The picture in the report shows what the database has, column by column."""

import base64
import os
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
from matplotlib.lines import Line2D

from embedding_pipeline.evaluation.history import Point
from embedding_pipeline.evaluation.plot import draw, mrr_plot

START = datetime(2026, 3, 1, 2, 0, tzinfo=UTC)


def nights(*figures: float) -> list[Point]:
    return [Point(START + timedelta(days=n), figure, "a") for n, figure in enumerate(figures)]


def xs(line: Line2D) -> list[float]:
    """In days, as matplotlib counts them."""
    return [float(x) for x in np.asarray(line.get_xdata(), dtype=float)]


def ys(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata(), dtype=float)]


def test_a_line_for_each_column_with_its_figures() -> None:
    figure = draw({"old": nights(0.7, 0.72), "new": nights(0.6, 0.5, 0.4), "empty": []}, {})
    assert figure is not None
    (axes,) = figure.axes
    assert [ys(line) for line in axes.lines] == [[0.7, 0.72], [0.6, 0.5, 0.4]]
    first, *_ = days = xs(axes.lines[1])
    assert [day - first for day in days] == [0, 1, 2]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text().strip() for text in legend.get_texts()] == ["old", "new"]


def test_floors_are_dashed_in_the_colour_of_their_column() -> None:
    figure = draw({"old": nights(0.7)}, {"old": 0.3, "unknown": 0.9})
    assert figure is not None
    line, floor = figure.axes[0].lines
    assert ys(floor) == [0.3, 0.3]
    assert floor.get_color() == line.get_color()
    assert floor.get_linestyle() == "--"


def test_a_new_golden_set_is_marked_between_the_evaluations() -> None:
    before, after = nights(0.7, 0.7)
    changed = Point(after.evaluated_at, after.mrr_at_5, "b")
    figure = draw({"old": [before, changed]}, {})
    assert figure is not None
    line, mark = figure.axes[0].lines
    assert xs(mark)[0] - xs(line)[0] == 0.5
    assert mark.get_linestyle() == ":"


def test_a_small_png_that_stands_in_markdown() -> None:
    uri = mrr_plot({"old": nights(*[0.5] * 100), "$new_\\": nights(*[0.7] * 100)}, {"old": 0.3})
    assert uri is not None
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    png = base64.b64decode(data, validate=True)
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (640, 224)
    assert len(png) < 40_000


def test_nothing_evaluated_is_no_picture() -> None:
    assert mrr_plot({}) is None
    assert mrr_plot({"new": []}) is None


def test_matplotlib_waits_until_something_is_drawn() -> None:
    code = "import embedding_pipeline.evaluation.plot, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_drawing_says_nothing_where_there_is_no_folder_for_a_cache() -> None:
    """As in a container whose user has no home: what `run` prints stays its own."""
    code = (
        "from datetime import datetime, UTC\n"
        "from embedding_pipeline.evaluation.history import Point\n"
        "from embedding_pipeline.evaluation.plot import mrr_plot\n"
        "assert mrr_plot({'a': [Point(datetime.now(UTC), 0.5, 'g')]})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MPLCONFIGDIR": "/proc/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
