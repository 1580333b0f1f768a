"""The core against its floors: writing only, and requesting only."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.endpoint import Endpoint
from benchmarks.lab import Lab, column_of, make_documents, table_spec
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from benchmarks.truth import WrongVectorError, check_rows
from benchmarks.worker import Usage, measure
from embedding_pipeline.spec import TableSpec

CASES = [
    # dimensions, dialect, type of the key
    (1536, "openai", "bigint"),
    (1536, "openai", "uuid"),
    (384, "openai", "bigint"),
    (384, "tei", "bigint"),
]


def embed_and_check(
    lab: Lab,
    spec: TableSpec,
    task: Mapping[str, Any],
    *,
    rows: int,
    key: str = "bigint",
    fingerprints: bool = True,
) -> Usage:
    """One job on a fresh table of so many pending rows, every one of them checked afterwards."""
    name = f"pending-{rows}-{key}-{spec.embeddings[0].column}"
    fill = partial(make_documents, spec=spec, rows=rows, key=key)
    with lab.database(name, lambda url: fill(url)) as url:
        usage = measure(lab, {**task, "url": url, "spec": spec.model_dump(mode="json")})
        if usage.result.get("stopped") or usage.result.get("left"):
            raise WrongVectorError(f"the run left rows: {usage.result}")
        check_rows(url, column_of(url, spec), rows=rows, fingerprints=fingerprints)
    return usage


def write_bound(lab: Lab, sizes: Sizes) -> list[Table]:
    """An endpoint at 0 ms: the database is the limit."""
    rows: list[dict[str, Cell]] = []
    figures: dict[str, Cell] = {}
    for dimensions, dialect, key in CASES:
        spec = table_spec(dimensions)
        with Endpoint(dimensions) as endpoint:
            task = {
                "endpoint": endpoint.url,
                "dialect": dialect,
                "batch": 64,
                "concurrency": 8,
                "dimensions": dimensions,
                "rows": sizes.rows,
            }
            found: dict[str, list[Usage]] = {"floor": [], "client": [], "core": []}
            for _ in range(sizes.rounds):
                found["floor"].append(
                    embed_and_check(
                        lab, spec, {**task, "job": "write_floor"}, rows=sizes.rows,
                        fingerprints=False,
                    )
                )  # fmt: skip
                found["client"].append(measure(lab, {**task, "job": "client"}))
                found["core"].append(
                    embed_and_check(lab, spec, {**task, "job": "core"}, rows=sizes.rows, key=key)
                )
        case = f"{dimensions} dimensions, {dialect}, {key} keys"
        floor = found["floor"]
        for name, words in (
            ("floor", "floor: staged COPY and UPDATE, nothing else"),
            ("client", "floor: requests only (openai)"),
            ("core", "the core"),
        ):
            used = found[name]
            cpu = [usage.per_thousand(sizes.rows) for usage in used]
            rows.append(
                {
                    "case": case,
                    "what": words,
                    "time": times(
                        middle(u.seconds / f.seconds for u, f in zip(used, floor, strict=True))
                    ),
                    "client CPU-s / 1,000 rows": middle(client for client, _ in cpu),
                    "server CPU-s / 1,000 rows": middle(server for _, server in cpu),
                    "peak MB above bare": middle(usage.above_mb for usage in used),
                }
            )
            figures[f"{case}: {name} seconds"] = middle(usage.seconds for usage in used)
    return [
        Table(
            f"Endpoint at 0 ms, {sizes.rows:,} rows: the core against writing alone",
            list(rows[0]),
            rows,
            ["`time` is relative to the staged COPY and UPDATE of the same round."],
            figures,
        )
    ]


def endpoint_bound(lab: Lab, sizes: Sizes) -> list[Table]:
    """An endpoint at 250 ms: requests in flight are the limit."""
    spec = table_spec(1536)
    found: dict[str, list[Usage]] = {"client": [], "core": [], "script": []}
    with Endpoint(1536, latency=0.25) as endpoint:
        task = {
            "endpoint": endpoint.url,
            "batch": 64,
            "concurrency": 32,
            "dimensions": 1536,
            "rows": sizes.rows,
        }
        for _ in range(sizes.rounds):
            found["client"].append(measure(lab, {**task, "job": "client"}))
            found["core"].append(
                embed_and_check(lab, spec, {**task, "job": "core"}, rows=sizes.rows)
            )
            found["script"].append(
                embed_and_check(
                    lab, spec, {**task, "job": "script"}, rows=sizes.script_rows,
                    fingerprints=False,
                )
            )  # fmt: skip
    rows: list[dict[str, Cell]] = []
    for name, words, done in (
        ("client", "floor: requests only", sizes.rows),
        ("core", "the core", sizes.rows),
        (
            "script",
            "hand-written script: batches of 50, an UPDATE a row",
            sizes.script_rows,
        ),
    ):
        used = found[name]
        cpu = [usage.per_thousand(done) for usage in used]
        pairs = list(zip(used, found["client"], strict=True))
        core = list(zip(used, found["core"], strict=True))
        rows.append(
            {
                "what": words,
                "time a row": times(
                    middle(u.seconds / done / (c.seconds / sizes.rows) for u, c in pairs)
                ),
                "the core is faster by": times(
                    middle(u.seconds / done / (c.seconds / sizes.rows) for u, c in core)
                ),
                "client CPU-s / 1,000 rows": middle(client for client, _ in cpu),
                "server CPU-s / 1,000 rows": middle(server for _, server in cpu),
            }
        )
    return [
        Table(
            f"Endpoint at 250 ms, {sizes.rows:,} rows, 32 requests of 64 in flight",
            list(rows[0]),
            rows,
            [
                f"The script embeds {sizes.script_rows:,} rows; its time a row does not depend on "
                "how many.",
            ],
            {f"{name} seconds": middle(u.seconds for u in used) for name, used in found.items()},
        )
    ]


def client_levers(lab: Lab, sizes: Sizes) -> list[Table]:
    """What each way of using the `openai` package brings."""
    ways = {
        "floats": "numbers in JSON, parsed by the package",
        "parsed": "base64, parsed by the package (its default)",
        "raw": "raw response, base64 to numpy",
        "raw_aiohttp": "the same over its aiohttp transport",
        "fastest": "and the request's body built here, checks included: what the product does",
    }
    found: dict[str, list[Usage]] = {way: [] for way in ways}
    texts = max(64, sizes.rows // 5)  # numbers in JSON take fifty times as long as the fastest
    with Endpoint(1536) as endpoint:
        for _ in range(sizes.rounds):
            for way in ways:
                task = {
                    "job": "client", "client": way, "endpoint": endpoint.url, "batch": 64,
                    "concurrency": 8, "dimensions": 1536, "rows": texts,
                }  # fmt: skip
                usage = measure(lab, task)
                if usage.result["written"] != texts:
                    raise WrongVectorError(f"{way}: {usage.result} of {texts} vectors")
                found[way].append(usage)
    default = found["parsed"]
    rows: list[dict[str, Cell]] = [
        {
            "the client": words,
            "rows/s": times(
                middle(d.seconds / u.seconds for u, d in zip(found[way], default, strict=True))
            ),
            "client CPU": times(
                middle(
                    u.client_cpu / d.client_cpu for u, d in zip(found[way], default, strict=True)
                )
            ),
            "client CPU-s / 1,000 rows": middle(
                usage.per_thousand(texts)[0] for usage in found[way]
            ),
        }
        for way, words in ways.items()
    ]
    return [
        Table(
            f"The openai package, {texts:,} texts of 1536 dimensions, 8 requests of 64",
            list(rows[0]),
            rows,
            ["`rows/s` and `client CPU` are relative to the package's default."],
            {f"{way} seconds": middle(u.seconds for u in found[way]) for way in ways},
        )
    ]
