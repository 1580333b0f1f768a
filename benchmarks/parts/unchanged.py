"""What it costs when little or nothing has changed, and memory against size."""

from functools import partial

from psycopg import sql

from benchmarks import corpus
from benchmarks.endpoint import Endpoint
from benchmarks.lab import TABLE, Lab, column_of, make_documents, table_spec
from benchmarks.parts.dagster_share import clean_environment
from benchmarks.parts.throughput import embed_and_check
from benchmarks.report import Cell, Table, middle
from benchmarks.sizes import Sizes
from benchmarks.truth import WrongVectorError, check_rows
from benchmarks.worker import Usage, measure
from embedding_pipeline.store.connection import connect

CHANGED_SHARE = 100
"""One row in so many is edited."""


def nothing_pending(lab: Lab, sizes: Sizes) -> list[Table]:
    """A table in which every row is up to date: what finding that out takes."""
    rows: list[dict[str, Cell]] = []
    small = max(100, sizes.table_rows // 100)
    for count in (small, sizes.table_rows):
        spec = table_spec(8, by={"by": "column", "column": "tenant"})
        fill = partial(
            make_documents, spec=spec, rows=count, embedded=True,
            write=corpus.short_text, tenants=sizes.tenants,
        )  # fmt: skip
        with lab.database(f"embedded-{count}", fill) as url, Endpoint(8) as endpoint:
            task = {
                "job": "repeated", "url": url, "spec": spec.model_dump(mode="json"),
                "endpoint": endpoint.url, "batch": 64, "concurrency": 8,
                "repeats": 3 * sizes.rounds,
            }  # fmt: skip
            usage = measure(lab, task, clean_environment())
            if endpoint.counts()["requests"]:
                raise WrongVectorError("nothing was pending, and yet the endpoint was asked")
        lab.forget(f"embedded-{count}")
        rows.append(
            {
                "rows": count,
                "the core, ms": middle(usage.result["core_ms"]),
                "a run's whole work, ms": middle(usage.result["run_ms"]),
            }
        )
    growth = [
        float(str(rows[1][name])) / float(str(rows[0][name]))
        for name in ("the core, ms", "a run's whole work, ms")
    ]
    rows.append(
        {
            "rows": f"{sizes.table_rows // small} × the rows",
            "the core, ms": f"{growth[0]:.2f} ×",
            "a run's whole work, ms": f"{growth[1]:.2f} ×",
        }
    )
    return [
        Table(
            f"Nothing pending, {sizes.tenants:,} tenants",
            list(rows[0]),
            rows,
            [
                "A run's whole work is the identity check, the count of what is pending and the "
                "report; milliseconds of this machine.",
            ],
        )
    ]


def one_percent(lab: Lab, sizes: Sizes) -> list[Table]:
    """One row in a hundred was edited: time and requests for those, not for the table."""
    spec = table_spec(1536)
    changed = max(1, sizes.rows // CHANGED_SHARE)
    wanted = -(-changed // 64)
    all_of_it: list[Usage] = []
    again: list[Usage] = []

    def fill(url: str) -> None:
        make_documents(url, spec, sizes.rows)

    with Endpoint(1536) as endpoint:
        task = {"job": "core", "endpoint": endpoint.url, "batch": 64, "concurrency": 8}
        for _ in range(sizes.rounds):
            with lab.database(f"pending-{sizes.rows}-bigint-embedding_1536", fill) as url:
                task |= {"url": url, "spec": spec.model_dump(mode="json")}
                all_of_it.append(measure(lab, task))
                with connect(url) as connection:
                    connection.execute("VACUUM documents")  # as a bulk run ends
                    for number in range(1, changed + 1):
                        connection.execute(
                            sql.SQL("UPDATE {} SET body = $1 WHERE id = $2").format(
                                sql.Identifier(TABLE)
                            ),
                            [corpus.text(number * CHANGED_SHARE, 1), number * CHANGED_SHARE],
                        )
                endpoint.counts(reset=True)
                again.append(measure(lab, task))
                # the first request, before the clocks ran, is one more
                asked = endpoint.counts()["requests"] - 1
                if asked != wanted or again[-1].result["written"] != changed:
                    raise WrongVectorError(
                        f"{changed} rows changed: {asked} requests ({wanted} expected), "
                        f"{again[-1].result['written']} written"
                    )
                check_rows(url, column_of(url, spec), rows=sizes.rows)
    share = middle(a.seconds / b.seconds for a, b in zip(again, all_of_it, strict=True))
    rows: list[dict[str, Cell]] = [
        {
            "what": f"{changed:,} of {sizes.rows:,} rows changed",
            "requests": wanted,
            "of the time for all rows": f"{share:.1%}",
            "seconds": middle(usage.seconds for usage in again),
        }
    ]
    return [Table("One per cent changed, endpoint at 0 ms", list(rows[0]), rows)]


def memory(lab: Lab, sizes: Sizes) -> list[Table]:
    """Peak memory of the core at several sizes."""
    spec = table_spec(384)
    rows: list[dict[str, Cell]] = []
    with Endpoint(384) as endpoint:
        task = {
            "job": "core", "endpoint": endpoint.url, "batch": 64, "concurrency": 8,
            "dimensions": 384,
        }  # fmt: skip
        for count in sizes.memory_rows:
            usage = embed_and_check(lab, spec, task, rows=count)
            lab.forget(f"pending-{count}-bigint-embedding_384")
            rows.append(
                {
                    "rows": count,
                    "peak MB above the bare process": usage.above_mb,
                    "bare process, MB": usage.bare_mb,
                    "rows/s": count / usage.seconds,
                }
            )
    first, last = (float(str(row["peak MB above the bare process"])) for row in (rows[0], rows[-1]))
    return [
        Table(
            "Memory against size, 384 dimensions, endpoint at 0 ms",
            list(rows[0]),
            rows,
            [f"From the smallest to the largest: {last - first:+.0f} MB."],
        )
    ]
