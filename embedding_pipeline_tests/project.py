"""The project pointed at a test's own database and tables, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedding_pipeline import settings
from embedding_pipeline.spec import TableSpec


def use_database(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """DATABASE_URL is the test's, and nothing else of this machine's settings counts."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "EMBEDDING_SERVICE_URL", "EMBEDDING_MODE"):
        monkeypatch.delenv(name, raising=False)
    set_variables(monkeypatch, DATABASE_URL=url)


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Environment variables that the settings read anew."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings.load_settings.cache_clear()


@contextmanager
def fresh_settings() -> Iterator[None]:
    """What a test sets is forgotten after it."""
    settings.load_settings.cache_clear()
    yield
    settings.load_settings.cache_clear()


def write_tables(folder: Path, *tables: TableSpec) -> None:
    """Each as `<folder>/<table>/defs.yaml`, for EMBEDDING_PIPELINE_DEFS."""
    import yaml

    for table in tables:
        home = folder / table.table
        home.mkdir(parents=True)
        document = {
            "type": "embedding_pipeline.EmbeddedTable",
            "attributes": table.model_dump(mode="json", exclude_unset=True),
        }
        (home / "defs.yaml").write_text(yaml.safe_dump(document, allow_unicode=True))
