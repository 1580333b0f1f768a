"""MRR@5 over time as a picture, for the report. Figures in, PNG out."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from embedding_pipeline.evaluation.history import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES, DPI = (8.0, 2.8), 80
"""640 × 224 pixels, some 15 kB: it is kept with every evaluation's event."""


def mrr_plot(
    histories: Mapping[str, Sequence[Point]], floors: Mapping[str, float] | None = None
) -> str | None:
    """A `data:` URI of a PNG: a line for each column, dashed its floor; None without a figure.

    `histories` maps a column to its evaluations, oldest first, `floors` to the least MRR@5 that
    its YAML asks for. A dotted line marks where the golden set changed: the figures on its two
    sides are answers to different questions.
    """
    figure = draw(histories, floors or {})
    if figure is None:
        return None
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def draw(histories: Mapping[str, Sequence[Point]], floors: Mapping[str, float]) -> Figure | None:
    """The same as matplotlib's figure, drawn without pyplot, which keeps state in the process."""
    shown = {column: points for column, points in histories.items() if points}
    if not shown:
        return None
    # building its cache of fonts, or having no folder for it, is no news to who evaluates
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # a third of a second that only an evaluation pays
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, (column, points) in enumerate(shown.items()):
        axes.plot(
            [_days(each.evaluated_at) for each in points],
            [each.mrr_at_5 for each in points],
            color=f"C{number}",
            marker="o",
            markersize=4,
            # a name is not to be read as a formula, nor hidden for its underscore
            label=" " + column.replace("$", r"\$"),
        )
        if column in floors:
            axes.axhline(floors[column], color=f"C{number}", linestyle="--", linewidth=0.8)
    for moment in _golden_set_changes(shown):
        axes.axvline(_days(moment), color="grey", linestyle=":", linewidth=1)
    locator = AutoDateLocator(minticks=2, maxticks=7)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    labels = ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(labels)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("MRR@5")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    return figure


def _days(moment: datetime) -> float:
    """As matplotlib counts time: days since 1970 in UTC."""
    return moment.timestamp() / 86_400


def _golden_set_changes(histories: Mapping[str, Sequence[Point]]) -> list[datetime]:
    """Half-way between two evaluations on different golden sets."""
    evaluations = sorted(
        (each for points in histories.values() for each in points),
        key=lambda each: each.evaluated_at,
    )
    return [
        before.evaluated_at + (after.evaluated_at - before.evaluated_at) / 2
        for before, after in pairwise(evaluations)
        if before.golden_set_hash != after.golden_set_hash
    ]
