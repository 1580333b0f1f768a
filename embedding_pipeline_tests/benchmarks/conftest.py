"""One server for the benchmarks' tests: theirs counts the CPU time of its processes."""

from collections.abc import Iterator

import pytest

from benchmarks.lab import Lab


@pytest.fixture(scope="package")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab
