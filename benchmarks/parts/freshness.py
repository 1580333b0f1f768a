"""From a commit to a row that search finds, with the sensor on."""

import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
from psycopg import sql

from benchmarks import corpus
from benchmarks.endpoint import Endpoint
from benchmarks.lab import TABLE, Lab, make_documents, table_spec
from benchmarks.parts.dagster_share import project
from benchmarks.parts.freshness_steps import UNFINISHED, step_cells, steps_of
from benchmarks.report import Cell, Table
from benchmarks.sizes import Sizes
from benchmarks.worker import ROOT
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.indexes import build_hnsw

WIDTH = 8
"""Narrow: the index of a million rows is built in a minute, and the way is the same."""
PATIENCE_SECONDS = 120.0
QUIET_SECONDS = 12.0


def freshness(lab: Lab, sizes: Sizes) -> list[Table]:
    """Edits at random moments; each is searched for by its own vector until it is found."""
    spec = table_spec(WIDTH, by={"by": "column", "column": "tenant"})

    def fill(url: str) -> None:
        make_documents(
            url, spec, sizes.table_rows, embedded=True, write=corpus.short_text,
            tenants=sizes.tenants,
        )  # fmt: skip
        with connect(url) as connection:
            column = bind_columns(connection, spec)[0]
            build_hnsw(connection, column)

    taken: list[float] = []
    steps: list[list[float]] = []
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
            # until the first edit is found everything is still starting; then the sample tables
            # are embedded and every table is evaluated
            _found_after(url, 1, log, 4 * PATIENCE_SECONDS)
            _settled(url, log)
            for number in range(sizes.freshness_commits):
                time.sleep(draw.uniform(0, 10))
                key = 2 + number * max(1, sizes.table_rows // (sizes.freshness_commits + 2))
                seconds, of_it = _found_after(url, key, log, PATIENCE_SECONDS)
                taken.append(seconds)
                steps += [of_it] if of_it else []
        finally:
            _stop(process)
    rows: list[dict[str, Cell]] = [
        {
            "commits": len(taken),
            "median, s": float(np.median(taken)),
            "95th percentile, s": float(np.quantile(taken, 0.95)),
            "slowest, s": max(taken),
            **step_cells(steps),
        }
    ]
    return [
        Table(
            f"Commit to found by search, {sizes.table_rows:,} rows, {sizes.tenants:,} tenants",
            list(rows[0]),
            rows,
            [
                "A sensor that looks every 5 s; an endpoint at 0 ms; a process for each run.",
                "The steps follow one another; each is a median: until the sensor looks, until it "
                "has requested a run, until the run leaves the queue, until its process executes "
                f"it, until search finds the row ({len(steps)} of {len(taken)} commits had a run "
                "of their own).",
            ],
        )
    ]


def _found_after(
    url: str, key: int, log: Path, patience: float
) -> tuple[float, list[float] | None]:
    """Edit one row; seconds from the commit until a search for its text finds it, and its steps."""
    name = f"embedding_{WIDTH}"
    text = corpus.text(key, 1)
    vector = str(corpus.vector_of(text, WIDTH).tolist())
    with connect(url) as connection:
        connection.execute(
            sql.SQL("UPDATE {} SET body = $1 WHERE id = $2").format(sql.Identifier(TABLE)),
            [text, key],
        )
        committed = time.monotonic(), _utc()
        connection.execute("SET hnsw.ef_search = 400")
        nearest = sql.SQL("SELECT id FROM {} ORDER BY {} <=> $1::vector LIMIT 10").format(
            sql.Identifier(TABLE), sql.Identifier(name)
        )
        while (key,) not in connection.execute(nearest, [vector]).fetchall():
            if time.monotonic() - committed[0] > patience:
                raise RuntimeError(
                    f"row {key} was not embedded in time:\n{log.read_text()[-4000:]}"
                )
            time.sleep(0.05)
        seconds = time.monotonic() - committed[0]
        return seconds, steps_of(connection, committed[1], _utc())


def _settled(url: str, log: Path) -> None:
    """Wait until no run has been under way for as long as two ticks take to come."""
    began = quiet_since = time.monotonic()
    with connect(url) as connection:
        while time.monotonic() - quiet_since < QUIET_SECONDS:
            if connection.execute(UNFINISHED).fetchone() != (0,):
                quiet_since = time.monotonic()
            if quiet_since - began > 4 * PATIENCE_SECONDS:
                raise RuntimeError(f"runs without end:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)


def _utc() -> datetime:
    """Now, as Dagster's tables have it."""
    return datetime.now(UTC).replace(tzinfo=None)


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
