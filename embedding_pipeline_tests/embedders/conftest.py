"""Fixtures for the embedders' tests."""

from collections.abc import Iterator

import pytest

from embedding_pipeline_tests.faults.server import FaultServer


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A fault server of its own for each test."""
    with FaultServer() as server:
        yield server
