"""Embedding providers: one port (`Embedder`), an adapter for each dialect, one retry loop.

What embeds (numpy with it) is imported when it is asked for: settings, sensors and checks read
endpoints in every process, and few of them embed.
"""

from typing import TYPE_CHECKING, Any

from embedding_pipeline.embedders.endpoints import load_endpoints
from embedding_pipeline.embedders.errors import (
    EmbedError,
    GlobalError,
    InputError,
    TransientError,
)
from embedding_pipeline.embedders.port import Embedder, EmbedResult, Endpoint

if TYPE_CHECKING:
    from embedding_pipeline.embedders.factory import create_embedder
    from embedding_pipeline.embedders.fallback import FallbackEmbedder, FallbackState, QueryVector

_LATER = {
    "FallbackEmbedder": "fallback",
    "FallbackState": "fallback",
    "QueryVector": "fallback",
    "create_embedder": "factory",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


__all__ = [
    "EmbedError",
    "EmbedResult",
    "Embedder",
    "Endpoint",
    "FallbackEmbedder",
    "FallbackState",
    "GlobalError",
    "InputError",
    "QueryVector",
    "TransientError",
    "create_embedder",
    "load_endpoints",
]
