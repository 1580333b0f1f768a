"""Fixtures for the embedders' tests."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from embedding_pipeline_tests.faults.server import FaultServer

# a loaded machine must not fail a test
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A fault server of its own for each test."""
    with FaultServer() as server:
        yield server
