"""The parts of the benchmark, by the names that the command line knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.lab import Lab
from benchmarks.parts import throughput
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
}
