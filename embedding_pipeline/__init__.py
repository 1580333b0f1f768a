"""Keeps pgvector embedding columns complete, current and comparable."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedding_pipeline.components.embedded_table import EmbeddedTable

__all__ = ["EmbeddedTable"]


def __getattr__(name: str) -> Any:
    # `type: embedding_pipeline.EmbeddedTable` in a table's YAML. Lazy, because the core, the
    # model server and most commands have no use for Dagster, which takes a second to import.
    if name == "EmbeddedTable":
        from embedding_pipeline.components.embedded_table import EmbeddedTable

        return EmbeddedTable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # `dg` finds component types by listing this module
    return sorted({*globals(), *__all__})
