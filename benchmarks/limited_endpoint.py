"""How much of a limited endpoint is used, and how much of that is spent on being throttled.

    python -m benchmarks.limited_endpoint [--seconds 10] [--settle 5] [--json FILE]

One server that answers in 50 ms and takes so many requests a second (429 beyond), asked by one
and by three processes for as much as it gives. All ratios are of one run on one machine, as the
server saw it: `share` is what passed of what the limit allowed, `throttled` what was refused of
what was sent, both after settling.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from embedding_pipeline.local.postgres import ensure_postgres, stop_postgres
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.embedders.load import Load, LoadProcess
from embedding_pipeline_tests.faults.server import FaultServer, WatchedRateLimit

LIMITERS = {
    # name: (adaptive, limit in YAML, limit in headers, shared)
    "none: 32 in flight, retried": (False, False, False, False),
    "adaptive, limit unknown": (True, False, False, False),
    "shared, limit unknown": (True, False, False, True),
    "each process keeps the limit": (True, True, False, False),
    "shared, limit from the YAML": (True, True, False, True),
    "shared, limit from the headers": (True, False, True, True),
}


def measure(
    limiter: str, processes: int, per_second: int, seconds: float, settle: float, database: str
) -> dict[str, float | int | str]:
    """One row of the table."""
    adaptive, in_yaml, in_headers, shared = LIMITERS[limiter]
    # a tenth of a second's worth may come at once, at least what three processes can coincide in
    burst = max(4, per_second / 10)
    limit = WatchedRateLimit(per_second=per_second, burst=burst, headers=in_headers)
    with FaultServer(rate_limit=limit, delay=0.05) as server, ExitStack() as opened:
        load = Load(
            server.openai_url,
            database=database if shared else None,
            requests_per_minute=60 * per_second if in_yaml else None,
            adaptive=adaptive,
        )
        running = [opened.enter_context(LoadProcess(load)) for _ in range(processes)]
        for process in running:
            process.begin()
        time.sleep(settle)
        limit.restart()
        began = time.monotonic()
        time.sleep(seconds)
        passed, refused, took = limit.passed, limit.refused, time.monotonic() - began
    return {
        "limiter": limiter,
        "requests_per_second": per_second,
        "processes": processes,
        "share": round(passed / (per_second * took), 3),
        "throttled": round(refused / max(1, passed + refused), 3),
    }


def main() -> None:
    """Print the table; write it as JSON where asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="measured, each case")
    parser.add_argument("--settle", type=float, default=5.0, help="before that")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="embedding-pipeline-bench-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        database = ensure_postgres(home)
        try:
            with connect(database) as connection:
                migrate(connection, [])
            print("| limiter | requests/s allowed | processes | share of the limit | throttled |")
            print("|---|---|---|---|---|")
            for per_second in (20, 100):
                for limiter in LIMITERS:
                    for processes in (1, 3):
                        row = measure(
                            limiter,
                            processes,
                            per_second,
                            options.seconds,
                            options.settle,
                            database,
                        )
                        rows.append(row)
                        print(
                            f"| {limiter} | {per_second} | {processes} | {row['share']:.1%} |"
                            f" {row['throttled']:.1%} |",
                            flush=True,
                        )
        finally:
            stop_postgres(home)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
