"""How much of a limited endpoint is used, and how much of that is spent on being throttled."""

from benchmarks.lab import Lab
from benchmarks.limited_endpoint import LIMITERS, measure
from benchmarks.report import Cell, Table
from benchmarks.sizes import Sizes
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.migrate import migrate

PER_SECOND = 20


def limited(lab: Lab, sizes: Sizes) -> list[Table]:
    """Each limiter by one and by three processes; `python -m benchmarks.limited_endpoint` alone
    measures longer and a second limit."""
    rows: list[dict[str, Cell]] = []
    seconds = sizes.limited_seconds
    with lab.empty_database() as url:
        with connect(url) as connection:
            migrate(connection, [])
        for limiter in LIMITERS:
            for processes in (1, 3):
                found = measure(limiter, processes, PER_SECOND, seconds, 0.6 * seconds, url)
                rows.append(
                    {
                        "limiter": limiter,
                        "processes": processes,
                        "share of the limit": f"{float(found['share']):.1%}",
                        "throttled": f"{float(found['throttled']):.1%}",
                    }
                )
    return [
        Table(f"An endpoint of {PER_SECOND} requests a second, 50 ms each", list(rows[0]), rows)
    ]
