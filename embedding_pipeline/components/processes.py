"""Which process executes a run, so that a run whose process is gone can be failed.

Leases tell while a run embeds. A run that died before or after (during an evaluation, say) would
stay STARTED for ever: Dagster's default launcher does not watch its processes.
"""

import socket
from collections.abc import Iterator

import dagster as dg
import psutil  # type: ignore[import-untyped]

from embedding_pipeline.components import names
from embedding_pipeline.spec import TableSpec

PROCESS_TAG = f"{names.OWNED}/process"


def process_tags() -> dict[str, str]:
    """The tag that says which process executes a run: host, pid, and when the process began."""
    me = psutil.Process()
    return {PROCESS_TAG: f"{socket.gethostname()}:{me.pid}:{me.create_time():.2f}"}


def tag_process(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Note that this process executes the run, where its launcher has not."""
    if PROCESS_TAG not in run.tags:
        instance.add_run_tags(run.run_id, process_tags())


def is_gone(tag: str) -> bool:
    """Whether the process of a tag ran on this host and is no more."""
    host, pid, began = tag.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        another = abs(process.create_time() - float(began)) > 1
        return bool(another or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def fail_dead_runs(instance: dg.DagsterInstance, table: TableSpec) -> Iterator[str]:
    """Fail a table's started runs whose processes are gone; yields what was done."""
    for run in instance.get_runs(
        dg.RunsFilter(
            tags={names.TABLE_TAG: table.asset_name}, statuses=[dg.DagsterRunStatus.STARTED]
        ),
        limit=100,
    ):
        tag = run.tags.get(PROCESS_TAG)
        if tag is not None and is_gone(tag):
            instance.report_run_failed(
                run,
                message="The process that executed this run is gone (killed, or its machine was "
                "restarted). What it had written is kept; run it again to go on.",
            )
            yield f"{table.table}: run {run.run_id} is dead and now shown as failed"
