"""OpenAI's dialect: the `openai` client, its retries off, base64 decoded straight to numpy."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from embedding_pipeline.embedders import responses
from embedding_pipeline.embedders.errors import TransientError
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.responses import Answer
from embedding_pipeline.embedders.wire import is_loopback, transport_error

if TYPE_CHECKING:
    from openai import AsyncOpenAI


CHUNK_BYTES = 1024 * 1024


class OpenAIWire:
    """`POST /embeddings`.

    The client's own parsing builds one Python float list a row; decoding the raw body costs half
    the CPU, and its aiohttp transport half of that again (see DESIGN.md, "Measured limits").
    """

    def __init__(self, model: str, dimensions: int) -> None:
        self._model = model
        self._dimensions = dimensions
        self._client: AsyncOpenAI | None = None
        self._endpoint: Endpoint | None = None
        self._proven = False

    async def open(self, endpoint: Endpoint) -> Endpoint:
        """Build the client; this dialect has no request that costs nothing and tells the model."""
        import openai

        self._endpoint = endpoint
        if self._client is None:
            self._client = openai.AsyncOpenAI(
                # the client insists on a key, also where the server wants none
                api_key=endpoint.key or "none",
                default_headers={"Authorization": endpoint.authorization}
                if endpoint.authorization
                else None,
                base_url=endpoint.asked_at,
                max_retries=0,
                timeout=endpoint.timeout_seconds,
                http_client=openai.DefaultAioHttpClient(
                    follow_redirects=False,
                    # reading the certificates of all authorities takes 60 ms
                    verify=endpoint.base_url.startswith("https:"),
                    trust_env=not is_loopback(endpoint.base_url),
                    event_hooks={"response": [_read_in_large_chunks]},
                ),
            )
        self._client.base_url = endpoint.asked_at
        return endpoint

    async def send(self, texts: Sequence[str]) -> Answer:
        """One `POST /embeddings`."""
        import aiohttp
        import httpx2
        import openai

        endpoint = self._endpoint
        assert endpoint is not None
        assert self._client is not None, "start() first"
        request: dict[str, Any] = {
            "model": self._model,
            "input": list(texts),
            "encoding_format": "base64",
        }
        if takes_dimensions(self._model):
            request["dimensions"] = self._dimensions
        try:
            # the client's timeouts are per read, so a server that drips never meets one
            async with asyncio.timeout(endpoint.timeout_seconds):
                # the method that the client's README gives for requests of one's own;
                # `embeddings.create` looks at every input, a quarter of the CPU time
                raw = await self._client.post(
                    "/embeddings",
                    content=to_json(request),
                    cast_to=httpx2.Response,
                    options={"headers": {"content-type": "application/json"}},
                )
                body = raw.content
        except openai.APIStatusError as error:
            raise responses.error_for_status(
                endpoint,
                self._model,
                error.status_code,
                _lower(error.response.headers),
                error.response.content,
            ) from None
        except (openai.APIConnectionError, aiohttp.ClientError, OSError) as error:
            raise transport_error(endpoint, error) from None
        return self._answer(body, _lower(raw.headers), len(texts))

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _answer(self, body: bytes, headers: dict[str, str], expected: int) -> Answer:
        endpoint = self._endpoint
        assert endpoint is not None
        parsed = responses.parse_json(endpoint, body)
        data = parsed.get("data") if isinstance(parsed, dict) else None
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise TransientError(
                f"{endpoint.name} answered /embeddings without a list of data", cause="response"
            )
        responses.check_model(endpoint, self._model, parsed.get("model"))
        responses.check_count(endpoint, len(data), expected)
        rows: list[Any] = [None] * expected
        for item in data:
            index = item.get("index")
            if type(index) is not int or not 0 <= index < expected or rows[index] is not None:
                raise TransientError(
                    f"{endpoint.name} answered with indexes that are not 0 to {expected - 1}, "
                    "each once",
                    cause="response",
                )
            embedding = item.get("embedding")
            # some servers of this dialect ignore encoding_format
            rows[index] = (
                embedding
                if isinstance(embedding, list)
                else responses.decode_base64(endpoint, embedding)
            )
        vectors = responses.check_vectors(
            endpoint, self._model, rows, self._dimensions, proven=self._proven
        )
        self._proven = True
        usage = parsed.get("usage")
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        return Answer(vectors, tokens if type(tokens) is int and tokens >= 0 else None, headers)


async def _read_in_large_chunks(response: Any) -> None:
    """The transport hands a body on in pieces of 16 kB, each through four generators: a tenth of
    the CPU time of an answer of half a megabyte."""
    stream: Any = getattr(response.stream, "_stream", None)
    if hasattr(stream, "CHUNK_SIZE"):
        stream.CHUNK_SIZE = CHUNK_BYTES


def takes_dimensions(model: str) -> bool:
    """Whether the model can be asked for a width (OpenAI's embeddings reference: 3 and later)."""
    return model.startswith("text-embedding-3-") or model == "all-minilm-l6-v2-layers"


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
