"""How commands print: tables, figures, progress."""

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

_TEXTS = {"table", "column", "model", "key", "partition", "error", "since", "last", "last_run_at"}


def make_console() -> "Console":
    from rich.console import Console

    # elsewhere than on a terminal, lines are for a file: never wrapped
    width = None if sys.stdout.isatty() else 240
    return Console(width=width, soft_wrap=True, highlight=False, markup=False)


class Bar:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: "Console", title: str) -> None:
        self.console, self.title = console, title
        self._progress: Any = None
        self._task: Any = None
        self._last = 0.0

    def __enter__(self) -> "Bar":
        return self

    def start(self, total: int) -> None:
        """Show that so many rows are pending."""
        # what comes at once is that nothing is done yet
        self._last = time.monotonic()
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=total, rate="")
        else:
            self.console.print(f"{self.title}: {total:,} rows pending")

    def update(self, at: Any) -> None:
        if self._progress is not None:
            eta = f", {at.eta_seconds:.0f} s left" if at.eta_seconds is not None else ""
            self._progress.update(self._task, completed=at.done, rate=f"{at.rate:,.0f} rows/s{eta}")
        elif time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            self.console.print(f"{self.title}: {at}")

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


class Lines:
    """Prints what a long statement says: of lines that only count on, one every five seconds."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._last = 0.0

    def __call__(self, line: str) -> None:
        if line.endswith(" %") and time.monotonic() - self._last < 5:
            return
        self._last = time.monotonic()
        self._console.print(line)


def figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    from rich.table import Table

    table = Table()
    for name in rows[0] if rows else []:
        table.add_column(name.replace("_", " "), justify="left" if name in _TEXTS else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    make_console().print(table)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "—" if value is None else str(value)
