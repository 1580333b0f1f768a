"""From a commit to a row that search finds, with the sensor on."""

import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
from psycopg import sql

from benchmarks import corpus
from benchmarks.endpoint import Endpoint
from benchmarks.lab import TABLE, Lab, make_documents, table_spec
from benchmarks.parts.dagster_share import project
from benchmarks.report import Cell, Table
from benchmarks.sizes import Sizes
from benchmarks.worker import ROOT
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.indexes import build_hnsw

WIDTH = 8
"""Narrow: the index of a million rows is built in a minute, and the way is the same."""
PATIENCE_SECONDS = 120.0


def freshness(lab: Lab, sizes: Sizes) -> list[Table]:
    """Edits at random moments; each is searched for by its own vector until it is found."""
    spec = table_spec(WIDTH, by={"by": "column", "column": "tenant"})

    def fill(url: str) -> None:
        make_documents(
            url, spec, sizes.table_rows, embedded=True, write=corpus.short_text,
            tenants=sizes.tenants,
        )  # fmt: skip
        with connect(url) as connection:
            build_hnsw(connection, bind_columns(connection, spec)[0])

    taken: list[float] = []
    with (
        lab.database("freshness", fill) as url,
        Endpoint(WIDTH) as endpoint,
        project(lab, url, spec, endpoint) as environment,
    ):
        lab.forget("freshness")
        log = lab.home / "dev.log"
        with log.open("wb") as output, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            process = subprocess.Popen(
                [sys.executable, "-m", "embedding_pipeline", "dev", "--port", str(port)],
                env=environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            draw = random.Random(0)
            # until the first edit is found everything is still starting
            _found_after(url, 1, log, 4 * PATIENCE_SECONDS)
            for number in range(sizes.freshness_commits):
                time.sleep(draw.uniform(0, 10))
                key = 2 + number * max(1, sizes.table_rows // (sizes.freshness_commits + 2))
                taken.append(_found_after(url, key, log, PATIENCE_SECONDS))
        finally:
            _stop(process)
    rows: list[dict[str, Cell]] = [
        {
            "commits": len(taken),
            "median, s": float(np.median(taken)),
            "95th percentile, s": float(np.quantile(taken, 0.95)),
            "slowest, s": max(taken),
        }
    ]
    return [
        Table(
            f"Commit to found by search, {sizes.table_rows:,} rows, {sizes.tenants:,} tenants",
            list(rows[0]),
            rows,
            ["A sensor that looks every 5 s; an endpoint at 0 ms; each run a process of its own."],
        )
    ]


def _found_after(url: str, key: int, log: Path, patience: float) -> float:
    """Edit one row; seconds from the commit until the row is what a search for its text finds."""
    name = f"embedding_{WIDTH}"
    text = corpus.text(key, 1)
    vector = str(corpus.vector_of(text, WIDTH).tolist())
    with connect(url) as connection:
        connection.execute(
            sql.SQL("UPDATE {} SET body = $1 WHERE id = $2").format(sql.Identifier(TABLE)),
            [text, key],
        )
        committed = time.monotonic()
        connection.execute("SET hnsw.ef_search = 400")
        nearest = sql.SQL("SELECT id FROM {} ORDER BY {} <=> $1::vector LIMIT 10").format(
            sql.Identifier(TABLE), sql.Identifier(name)
        )
        while (key,) not in connection.execute(nearest, [vector]).fetchall():
            if time.monotonic() - committed > patience:
                raise RuntimeError(
                    f"row {key} was not embedded in time:\n{log.read_text()[-4000:]}"
                )
            time.sleep(0.05)
    return time.monotonic() - committed


def _stop(process: "subprocess.Popen[bytes]") -> None:
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for each in family:
        with suppress(psutil.Error):
            if "embedding_pipeline.local" not in " ".join(each.cmdline()):
                each.kill()
