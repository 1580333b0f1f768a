"""What Dagster adds: importing the definitions, a run of ten rows, a sensor tick."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml

from benchmarks import corpus
from benchmarks.endpoint import Endpoint
from benchmarks.lab import Lab, make_documents, table_spec
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from benchmarks.worker import ROOT, measure
from embedding_pipeline.settings import Settings
from embedding_pipeline.spec import TableSpec

TEN = 10


def clean_environment() -> dict[str, str]:
    """This process's environment without any of the project's settings."""
    ours = {name.upper() for name in Settings.model_fields} | {"POSTGRES_URL", "DAGSTER_HOME"}
    return {name: value for name, value in os.environ.items() if name not in ours}


@contextmanager
def project(lab: Lab, url: str, spec: TableSpec, endpoint: Endpoint) -> Iterator[dict[str, str]]:
    """The environment of a project with this table beside the shipped ones, and a Dagster home."""
    folder = Path(mkdtemp(prefix="bench-project-"))
    try:
        home = folder / "tables" / spec.table
        home.mkdir(parents=True)
        document = {
            "type": "embedding_pipeline.EmbeddedTable",
            "attributes": spec.model_dump(mode="json", exclude_unset=True),
        }
        (home / "defs.yaml").write_text(yaml.safe_dump(document))
        (folder / "dagster").mkdir()
        shutil.copy(ROOT / "dagster.yaml", folder / "dagster")
        yield clean_environment() | {
            "DATABASE_URL": url,
            "DAGSTER_HOME": str(folder / "dagster"),
            "EMBEDDING_PIPELINE_HOME": str(lab.home),
            "EMBEDDING_PIPELINE_DEFS": str(folder / "tables"),
            "OPENAI_BASE_URL": endpoint.openai_url,
            "OPENAI_API_KEY": "benchmark",
            "PYTHONPATH": str(ROOT),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_IMPORTS = """
import sys, time
begun = time.perf_counter(), time.process_time()
import dagster
at_dagster, modules = (time.perf_counter(), time.process_time()), set(sys.modules)
from embedding_pipeline.definitions import defs
defs().get_repository_def()
done = time.perf_counter(), time.process_time()
print(*(b - a for a, b in zip(begun, at_dagster)), *(b - a for a, b in zip(at_dagster, done)),
      len(modules), len(set(sys.modules) - modules))
"""


def imports(lab: Lab, sizes: Sizes) -> list[Table]:
    """A fresh interpreter: `import dagster`, then the definitions."""
    found: list[list[float]] = []
    for _ in range(max(3, sizes.rounds)):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS],
            env=clean_environment() | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append([float(word) for word in done.stdout.split()])
    columns = list(zip(*found, strict=True))
    rows: list[dict[str, Cell]] = [
        {
            "what": "import dagster",
            "seconds": middle(columns[0]),
            "CPU-s": middle(columns[1]),
            "modules": int(columns[4][0]),
        },
        {
            "what": "the definitions, beyond that",
            "seconds": middle(columns[2]),
            "CPU-s": middle(columns[3]),
            "modules": int(columns[5][0]),
        },
        {
            "what": "ratio",
            "seconds": times(middle(row[2] / row[0] for row in found)),
            "CPU-s": times(middle(row[3] / row[1] for row in found)),
        },
    ]
    return [Table("Loading the definitions (four tables)", list(rows[0]), rows)]


def ten_rows(lab: Lab, sizes: Sizes) -> list[Table]:
    """Ten changed rows as a Dagster run: inside a process, and as a process of its own."""
    spec = table_spec(1536)
    whats = ("core", "inside", "process")
    found: dict[str, list[float]] = {name: [] for what in whats for name in (what, f"{what}_cpu")}
    name = f"pending-{TEN}-bigint-embedding_1536"
    for _ in range(sizes.rounds):
        with (
            lab.database(name, lambda url: make_documents(url, spec, TEN)) as url,
            Endpoint(1536) as endpoint,
            project(lab, url, spec, endpoint) as environment,
        ):
            task: dict[str, Any] = {
                "job": "dagster_runs", "url": url, "spec": spec.model_dump(mode="json"),
                "endpoint": endpoint.url, "batch": 64, "concurrency": 8, "rows": TEN,
            }  # fmt: skip
            result = measure(lab, task, environment).result
            for what in found:
                found[what].append(result[what])
    rows: list[dict[str, Cell]] = [
        {
            "ten changed rows": words,
            "seconds": middle(found[what]),
            "client CPU-s": middle(found[f"{what}_cpu"]),
            "ratio": times(middle(a / b for a, b in zip(found[what], found["core"], strict=True))),
        }
        for what, words in (
            ("core", "the core, called directly"),
            ("inside", "a Dagster run inside the process"),
            ("process", "a Dagster run as a process of its own (`dagster asset materialize`)"),
        )
    ]
    return [
        Table(
            "Dagster's share of a small run",
            list(rows[0]),
            rows,
            ["Dagster's storage is the Postgres server; from the start of the run to its end."],
        )
    ]


def sensor_tick(lab: Lab, sizes: Sizes) -> list[Table]:
    """A tick of the sensor on a large table with eight embedding columns."""
    spec = table_spec(list(range(4, 12)), by={"by": "column", "column": "tenant"})
    fill = partial(
        make_documents, spec=spec, rows=sizes.table_rows, embedded=True,
        write=corpus.short_text, tenants=sizes.tenants,
    )  # fmt: skip
    with (
        lab.database("sensor", fill) as url,
        Endpoint(4) as endpoint,
        project(lab, url, spec, endpoint) as environment,
    ):
        task = {
            "job": "ticks", "url": url, "spec": spec.model_dump(mode="json"),
            "repeats": 3 * sizes.rounds, "tenants": sizes.tenants,
        }  # fmt: skip
        result = measure(lab, task, environment).result
    lab.forget("sensor")
    rows: list[dict[str, Cell]] = [
        {
            "pending": words,
            "tick, ms": middle(result[what]),
            "of that in the database, ms": middle(result[f"{what}_queries"]),
        }
        for what, words in (
            ("nothing", "nothing"),
            ("some", f"a row in each of {max(1, sizes.tenants // 10):,} tenants, every column"),
        )
    ]
    return [
        Table(
            f"A sensor tick: {sizes.table_rows:,} rows, {sizes.tenants:,} tenants, 8 columns",
            list(rows[0]),
            rows,
            [
                "In the database: one count of pending rows by tenant a column, over a connection "
                "that is open already."
            ],
        )
    ]
