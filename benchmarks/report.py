"""What a part of the benchmark found: tables that print as Markdown and go into one JSON."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil  # type: ignore[import-untyped]

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """One Markdown table. Rows are mappings by column; a missing or None cell prints as `–`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]
    notes: Sequence[str] = ()
    figures: Mapping[str, Cell] = field(default_factory=dict)
    """What only the JSON holds: the raw medians, in seconds and bytes."""

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        for row in self.rows:
            lines.append("| " + " | ".join(_cell(row.get(name)) for name in self.columns) + " |")
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def middle(values: Iterable[float]) -> float:
    """The median: rounds on a shared machine have outliers, always to one side."""
    return float(median(values))


def times(value: float) -> str:
    """A ratio as it is read: `1.24 ×`."""
    return f"{value:.2f} ×"


def machine() -> dict[str, Cell]:
    """What these figures were measured on."""
    memory = psutil.virtual_memory().total / 1024**3
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(memory, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, parts: Mapping[str, Sequence[Table]], about: Mapping[str, Cell]) -> None:
    """Everything measured, as one document."""
    document = {
        "machine": dict(about),
        "parts": {
            name: [
                {
                    "title": table.title,
                    "rows": [dict(row) for row in table.rows],
                    "notes": list(table.notes),
                    "figures": dict(table.figures),
                }
                for table in tables
            ]
            for name, tables in parts.items()
        },
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
