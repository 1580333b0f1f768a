"""Whether a provider answers, asked when somebody waits for it.

A run would find that out too, but only after its retries, minutes later, and it backs off for up
to an hour: a trial request says within a tick that a provider is down, and that it is back. It is
one short text, sent only while rows have waited for half a minute or a run has failed.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from embedding_pipeline.alerts.facts import ColumnFacts, ProviderFacts
from embedding_pipeline.embedders import load_endpoints
from embedding_pipeline.embedders.errors import GlobalError, TransientError
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import EmbeddingSpec

WAITED_SECONDS = 30.0
TIMEOUT_SECONDS = 10.0
TRIAL_TEXT = "hello"


def waited_for(
    columns: Sequence[ColumnFacts], now: float, open_incidents: Collection[str] = ()
) -> dict[str, list[ColumnFacts]]:
    """Provider → columns with pending rows, of providers that are worth a trial request.

    Those for which rows have waited for half a minute or a run has failed, and (with no columns, if
    nothing waits any more) those with an open incident.
    """
    found: dict[str, list[ColumnFacts]] = {name: [] for name in open_incidents}
    worth: set[str] = set(open_incidents)
    for facts in columns:
        if not facts.pending or facts.held is not None:
            continue
        found.setdefault(facts.provider, []).append(facts)
        since = facts.pending_since
        if facts.failing or (since is not None and now - since.timestamp() >= WAITED_SECONDS):
            worth.add(facts.provider)
    return {name: found[name] for name in sorted(worth)}


async def ask(embedding: EmbeddingSpec) -> tuple[str | None, bool] | None:
    """Embed one short text as a run would, once: (what went wrong, whether for good).

    None when the provider was busy (429), which says nothing about it.
    """
    from embedding_pipeline.embedders import create_embedder  # with numpy, which loading needs not

    try:
        endpoints = load_endpoints(load_settings())
        if embedding.provider not in endpoints:
            return f"provider {embedding.provider!r} is not declared", True
        endpoint = replace(endpoints[embedding.provider], timeout_seconds=TIMEOUT_SECONDS)
        embedder = create_embedder(
            endpoint, embedding.model, embedding.dimensions, prefix=embedding.prefix
        )
        try:
            result = await asyncio.wait_for(
                embedder.embed([TRIAL_TEXT], retry=False), 2 * TIMEOUT_SECONDS
            )
        finally:
            await embedder.aclose()
    except TransientError as error:
        return None if error.cause == "throttled" else (str(error), False)
    except TimeoutError:
        return f"no answer within {2 * TIMEOUT_SECONDS:.0f} s", False
    except GlobalError as error:
        return str(error), True
    except PipelineError as error:
        return str(error), False
    if result.refused:
        return f"it refuses a plain text: {next(iter(result.refused.values()))}", True
    return None, False


def look_at_providers(
    columns: Sequence[ColumnFacts],
    embeddings: Mapping[str, EmbeddingSpec],
    now: float,
    open_incidents: Collection[str] = (),
) -> list[ProviderFacts]:
    """Ask every provider that is waited for; `embeddings` by `table.column`."""
    wanted = waited_for(columns, now, open_incidents)
    asked: dict[str, EmbeddingSpec] = {}
    for name, waiting in wanted.items():
        mine = [facts.name for facts in waiting] or [
            column for column, spec in embeddings.items() if spec.provider == name
        ]
        if mine:
            asked[name] = embeddings[mine[0]]

    async def all_of_them() -> list[tuple[str | None, bool] | None]:
        return await asyncio.gather(*map(ask, asked.values()))

    found = []
    for name, answer in zip(asked, asyncio.run(all_of_them()), strict=True):
        error, final = answer if answer is not None else (None, False)
        found.append(
            ProviderFacts(
                name,
                error,
                final,
                frozenset(facts.name for facts in wanted[name]),
                sum(facts.pending for facts in wanted[name]),
                unknown=answer is None,
            )
        )
    return found
