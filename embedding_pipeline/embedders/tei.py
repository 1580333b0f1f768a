"""Text Embeddings Inference: `POST /embed` with `truncate: false`, limits from `GET /info`."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from embedding_pipeline.embedders import responses
from embedding_pipeline.embedders.errors import GlobalError, TransientError
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.responses import Answer
from embedding_pipeline.embedders.wire import is_loopback, transport_error

if TYPE_CHECKING:
    import aiohttp


class TeiWire:
    """TEI's own dialect over aiohttp."""

    def __init__(self, model: str, dimensions: int) -> None:
        self._model = model
        self._dimensions = dimensions
        self._session: aiohttp.ClientSession | None = None
        self._endpoint: Endpoint | None = None
        self._proven = False
        self._unverified = False

    async def open(self, endpoint: Endpoint) -> Endpoint:
        """Ask `/info` whether this is the model, and how much it takes."""
        import aiohttp

        self._endpoint = endpoint
        if self._session is None:
            self._verifying = asyncio.Lock()
            headers = {"content-type": "application/json"}
            if endpoint.authorization:
                headers["authorization"] = endpoint.authorization
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=0),
                trust_env=not is_loopback(endpoint.base_url),
                trace_configs=[self._connection_watch()],
            )
        self._endpoint = await self._verified(endpoint)
        return self._endpoint

    def _connection_watch(self) -> "aiohttp.TraceConfig":
        """A new connection may lead to another server than the one whose model was checked:
        TEI's answers do not name the model, and a container can be replaced in mid-run."""
        import aiohttp

        async def connected(_: object, context: SimpleNamespace, __: object) -> None:
            if context.trace_request_ctx == "/embed":
                self._unverified = True

        watch = aiohttp.TraceConfig()
        watch.on_connection_create_end.append(connected)
        return watch

    async def _verified(self, endpoint: Endpoint) -> Endpoint:
        """Ask `/info` for the model; the endpoint with the limits that it states."""
        _, body = await self._request("GET", "/info", None)
        info = responses.parse_json(endpoint, body)
        if not isinstance(info, dict) or "model_id" not in info:
            raise GlobalError(
                f"{endpoint.name} at {endpoint.address} answers /info without a model_id; "
                "it is not a TEI server, mend the address"
            )
        responses.check_model(endpoint, self._model, info["model_id"])
        return _with_limits(endpoint, info)

    async def _verify_new_connections(self, endpoint: Endpoint) -> None:
        if not (self._unverified or self._verifying.locked()):
            return
        async with self._verifying:
            if self._unverified:
                self._unverified = False
                try:
                    await self._verified(endpoint)
                except BaseException:
                    self._unverified = True
                    raise

    async def send(self, texts: Sequence[str]) -> Answer:
        """One `POST /embed`."""
        assert self._endpoint is not None
        body = to_json({"inputs": list(texts), "truncate": False, "normalize": True})
        headers, answered = await self._request("POST", "/embed", body)
        await self._verify_new_connections(self._endpoint)
        rows = responses.parse_json(self._endpoint, answered)
        if not isinstance(rows, list):
            raise TransientError(
                f"{self._endpoint.name} answered /embed with something that is not a list",
                cause="response",
            )
        responses.check_count(self._endpoint, len(rows), len(texts))
        vectors = responses.check_vectors(
            self._endpoint, self._model, rows, self._dimensions, proven=self._proven
        )
        self._proven = True
        counted = headers.get("x-compute-tokens", "")
        return Answer(vectors, int(counted) if counted.isdecimal() else None, headers)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[dict[str, str], bytes]:
        import aiohttp

        endpoint = self._endpoint
        assert endpoint is not None
        assert self._session is not None, "start() first"
        try:
            async with self._session.request(
                method,
                endpoint.asked_at + path,
                data=body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=endpoint.timeout_seconds),
                trace_request_ctx=path,
            ) as response:
                content = await response.read()
                headers = {name.lower(): value for name, value in response.headers.items()}
                status = response.status
        except (aiohttp.ClientError, OSError) as error:  # OSError: also TimeoutError
            raise transport_error(endpoint, error) from None
        if not 200 <= status < 300:
            raise responses.error_for_status(endpoint, self._model, status, headers, content)
        return headers, content


def _with_limits(endpoint: Endpoint, info: dict[str, Any]) -> Endpoint:
    """The endpoint's limits, lowered to what `/info` says.

    A request of n inputs takes n of TEI's `max_concurrent_requests` permits, so fewer full
    requests than that fit at once; past it TEI answers 429.
    """

    def said(name: str) -> int | None:
        value = info.get(name)
        return value if isinstance(value, int) and value > 0 else None

    inputs = min(endpoint.max_inputs, said("max_client_batch_size") or 32)
    permits = said("max_concurrent_requests")
    return replace(
        endpoint,
        max_inputs=inputs,
        max_tokens_per_input=min(
            endpoint.max_tokens_per_input,
            said("max_input_length") or endpoint.max_tokens_per_input,
        ),
        concurrency=min(endpoint.concurrency, max(1, permits // inputs))
        if permits
        else endpoint.concurrency,
    )
