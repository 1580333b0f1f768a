"""Endpoint and model → embedder."""

from collections.abc import Callable

from embedding_pipeline.embedders.budget import Budget, budget_for
from embedding_pipeline.embedders.engine import ProviderEmbedder
from embedding_pipeline.embedders.openai import OpenAIWire
from embedding_pipeline.embedders.port import Embedder, Endpoint, Overlong
from embedding_pipeline.embedders.tei import TeiWire
from embedding_pipeline.embedders.wire import Wire


def create_embedder(
    endpoint: Endpoint,
    model: str,
    dimensions: int,
    *,
    overlong: Overlong = "truncate",
    prefix: str = "",
    budgets: Callable[[Endpoint, str], Budget] = budget_for,
) -> Embedder:
    """An embedder that is connected by its `start` (or first `embed`).

    An endpoint without an address is the local model server, which is started then if need be.
    All embedders of one endpoint share its limiter (in one event loop) and its budget: one in
    this process, or what `budgets` gives.
    """
    wire: Wire = (TeiWire if endpoint.dialect == "tei" else OpenAIWire)(model, dimensions)
    return ProviderEmbedder(
        endpoint, model, dimensions, wire, budgets=budgets, overlong=overlong, prefix=prefix
    )
