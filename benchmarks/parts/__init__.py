"""The parts of the benchmark, by the names that the command line knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.lab import Lab
from benchmarks.parts import (
    dagster_share,
    freshness,
    growth,
    index,
    limited,
    model,
    throughput,
    unchanged,
    whole_run,
)
from benchmarks.report import Table
from benchmarks.sizes import Sizes


@dataclass(frozen=True)
class Part:
    """One part: what it is about, in a line, and what runs it."""

    about: str
    run: Callable[[Lab, Sizes], Sequence[Table]]


PARTS: dict[str, Part] = {
    "write": Part("the core at 0 ms against COPY and UPDATE alone", throughput.write_bound),
    "endpoint": Part("the core at 250 ms against requests alone", throughput.endpoint_bound),
    "levers": Part("what each lever of the openai package brings", throughput.client_levers),
    "nothing": Part("nothing pending in a large table", unchanged.nothing_pending),
    "changed": Part("one per cent changed", unchanged.one_percent),
    "memory": Part("the core's peak memory against the number of rows", unchanged.memory),
    "imports": Part("loading the definitions beyond `import dagster`", dagster_share.imports),
    "run": Part("ten changed rows as a Dagster run", dagster_share.ten_rows),
    "bulk": Part("a table full of pending rows as a Dagster run", whole_run.bulk_run),
    "sensor": Part("a sensor tick on a large table", dagster_share.sensor_tick),
    "index": Part("HNSW: workers, halfvec, writing in place or load then build", index.index),
    "growth": Part("time, memory, pending index and users' writes against size", growth.growth),
    "model": Part("the local model server and sentence-transformers", model.local_model),
    "fresh": Part("from a commit to a row that search finds", freshness.freshness),
    "limited": Part("a limited endpoint: used, and wasted on being throttled", limited.limited),
}
