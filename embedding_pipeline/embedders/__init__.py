"""Embedding providers: one port (`Embedder`), an adapter for each dialect, one retry loop."""

from embedding_pipeline.embedders.endpoints import load_endpoints
from embedding_pipeline.embedders.errors import (
    EmbedError,
    GlobalError,
    InputError,
    TransientError,
)
from embedding_pipeline.embedders.factory import create_embedder
from embedding_pipeline.embedders.fallback import FallbackEmbedder, FallbackState, QueryVector
from embedding_pipeline.embedders.port import Embedder, EmbedResult, Endpoint

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
