"""Postgres is restarted under a run."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedding_pipeline.local import postgres
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.faults.runs import Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import assert_exact
from embedding_pipeline_tests.sessions import wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

ROWS = 3_000


class Cluster:
    """A server of the test's own, which only the test starts and stops."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._data = folder, folder / "data"
        self._account = postgres._account(self._data)
        if self._account is not None:
            os.chown(folder, self._account.pw_uid, self._account.pw_gid)
        self._call("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write("listen_addresses = ''\nfsync = off\nshared_buffers = 32MB\n")
            settings.write(f"unix_socket_directories = '{folder}'\n")
        self.pg_ctl("start")

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def pg_ctl(self, *what: str) -> None:
        self._call("pg_ctl", *what, "--wait", f"--log={self.folder / 'log'}")

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(postgres._binaries() / program), *arguments, f"--pgdata={self._data}"],
            cwd=self.folder,
            env=postgres._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            **postgres._as(self._account),
        )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
    cluster = None
    try:
        cluster = Cluster(folder)
        yield cluster
    finally:
        if cluster is not None:
            cluster.pg_ctl("stop", "--mode=immediate")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(cluster: Cluster) -> str:
    """In place of the shared server's."""
    with connect(cluster.url) as connection:
        connection.execute("CREATE EXTENSION vector")
    return cluster.url


@pytest.mark.slow
def test_immediate_restarts_lose_nothing_and_double_nothing(
    pipeline: Pipeline, cluster: Cluster, server: FaultServer
) -> None:
    """A managed Postgres failed over at night. The script's connection was gone, its `except`
    logged that and went on embedding: 140,000 vectors were paid for and never written."""
    with connect(pipeline.url) as connection:
        create_docs(connection, ROWS)
    pipeline.declare(faulty=provider(server))
    column = pipeline.column(
        spec(embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)])
    )
    server.delay = 0.03

    def restart() -> int:
        for inputs in (200, 1_000, 1_800):
            wait_until(lambda inputs=inputs: server.count.inputs >= inputs, "the run to get on")  # type: ignore[misc]
            cluster.pg_ctl("restart", "--mode=immediate")
        return 3

    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(restart)
        run = pipeline.run(column, batch_size=16, concurrency=4)
        assert restarted.result() == 3

    assert run.remaining == {}
    assert run.outcome.stopped is None
    total = run.outcome.total
    # a write whose commit was not heard of is found done when it is repeated
    assert total.embedded + total.superseded == ROWS
    assert server.count.inputs == ROWS
    assert set(server.count.texts.values()) == {1}
    with connect(pipeline.url) as connection:
        assert_exact(connection, column)
