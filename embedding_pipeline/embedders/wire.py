"""What an adapter has to do: send one request, once. Everything else is the engine's."""

from collections.abc import Iterator, Sequence
from typing import Protocol
from urllib.parse import urlsplit

from embedding_pipeline.embedders.errors import EmbedError, GlobalError, TransientError
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.responses import Answer


class Wire(Protocol):
    """One endpoint's dialect over HTTP for one model; no retry, no splitting."""

    async def open(self, endpoint: Endpoint) -> Endpoint:
        """Connect to `endpoint.base_url`; returns the endpoint with the limits it really has."""
        ...

    async def send(self, texts: Sequence[str]) -> Answer:
        """One request. Raises TransientError, GlobalError or InputError."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


def is_loopback(base_url: str) -> bool:
    """Whether the address is this machine's own, where a proxy from the environment is wrong."""
    host = urlsplit(base_url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def transport_error(endpoint: Endpoint, error: BaseException) -> EmbedError:
    """The error for a request that got no whole answer, by what aiohttp says deep down.

    The `openai` client over aiohttp reports a refused connection and a reset as timeouts, so its
    own classes do not tell them apart.
    """
    import aiohttp

    chain = list(_causes(error))
    if any(isinstance(e, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError) for e in chain):
        return GlobalError(f"{endpoint.name}: {endpoint.address!r} is not an address")
    if any(isinstance(e, aiohttp.ClientSSLError) for e in chain):
        return GlobalError(
            f"{endpoint.name} at {endpoint.address}: no encrypted connection ({chain[-1]}); mend "
            "the address or the certificate"
        )
    if any(isinstance(e, aiohttp.ClientConnectorError) for e in chain):
        return TransientError(
            f"{endpoint.name} at {endpoint.address} cannot be reached; is it running?",
            cause="unreachable",
        )
    if any(isinstance(e, TimeoutError) for e in chain):
        return TransientError(
            f"{endpoint.name} gave no whole answer within {endpoint.timeout_seconds:g} s",
            cause="timeout",
        )
    return TransientError(
        f"{endpoint.name} broke the connection before its answer was whole "
        f"({type(chain[-1]).__name__})",
        cause="broken",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
