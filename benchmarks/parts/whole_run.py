"""The same work three ways: writing alone, the core called directly, and a Dagster run of it."""

from functools import partial
from typing import Any

from benchmarks.endpoint import Endpoint
from benchmarks.lab import Lab, column_of, make_documents, table_spec
from benchmarks.parts.dagster_share import project
from benchmarks.parts.throughput import embed_and_check
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from benchmarks.truth import WrongVectorError, check_rows
from benchmarks.worker import Usage, measure


def bulk_run(lab: Lab, sizes: Sizes) -> list[Table]:
    """A table full of pending rows; the endpoint answers at once."""
    spec = table_spec(1536)
    name = f"pending-{sizes.rows}-bigint-embedding_1536"
    fill = partial(make_documents, spec=spec, rows=sizes.rows)
    found: dict[str, list[Usage]] = {"floor": [], "core": [], "run": []}
    with Endpoint(1536) as endpoint:
        task: dict[str, Any] = {
            "endpoint": endpoint.url, "batch": 64, "concurrency": 32, "dimensions": 1536,
            "rows": sizes.rows,
        }  # fmt: skip
        for _ in range(sizes.rounds):
            found["floor"].append(
                embed_and_check(
                    lab, spec, {**task, "job": "write_floor"}, rows=sizes.rows, fingerprints=False
                )
            )
            found["core"].append(
                embed_and_check(lab, spec, {**task, "job": "core"}, rows=sizes.rows)
            )
            with (
                lab.database(name, lambda url: fill(url)) as url,
                project(lab, url, spec, endpoint) as environment,
            ):
                task |= {"url": url, "spec": spec.model_dump(mode="json")}
                used = measure(lab, {**task, "job": "bulk_run"}, environment)
                if used.result["stopped"]:
                    raise WrongVectorError(used.result["stopped"])
                check_rows(url, column_of(url, spec), rows=sizes.rows)
                found["run"].append(used)
    rows: list[dict[str, Cell]] = []
    for what, words in (
        ("floor", "floor: staged COPY and UPDATE, nothing else"),
        ("core", "the core, called directly"),
        ("run", "a Dagster run of all partitions, inside its process"),
    ):
        cpu = [usage.per_thousand(sizes.rows) for usage in found[what]]
        rows.append(
            {
                "what": words,
                "time": times(
                    middle(
                        usage.seconds / floor.seconds
                        for usage, floor in zip(found[what], found["floor"], strict=True)
                    )
                ),
                "client CPU-s / 1,000 rows": middle(client for client, _ in cpu),
                "server CPU-s / 1,000 rows": middle(server for _, server in cpu),
                "peak MB above bare": middle(usage.above_mb for usage in found[what]),
            }
        )
    return [
        Table(
            f"The same {sizes.rows:,} rows of 1536 dimensions as a Dagster run",
            list(rows[0]),
            rows,
            [
                "32 requests of 64 in flight. A run also counts what is pending before and after, "
                "holds leases, reserves its cost, writes Dagster's events to the same server, runs "
                "VACUUM, and checks the column."
            ],
            {f"{what} seconds": middle(u.seconds for u in used) for what, used in found.items()},
        )
    ]
