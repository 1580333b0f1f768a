"""The two HTTP dialects that the local model server speaks.

TEI's, as text-embeddings-inference 1.8 speaks it (1.9 answers validation errors with 422 instead
of 413 and truncates unless told not to), and OpenAI's. Both refuse what the originals refuse,
with their status codes and bodies, so that clients meet here what they would meet there.
"""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic_core import from_json, to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from embedding_pipeline.local.batcher import Batcher, ModelFailureError, Source
from embedding_pipeline.local.minilm import BATCH_TOKENS, MAX_TOKENS, MiniLM, Space, Vectors

_log = logging.getLogger(__name__)

MODEL_384 = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_1536 = "all-minilm-l6-v2-layers"
OPENAI_MODELS = {
    MODEL_384: Space.LAST_LAYER,
    "all-minilm-l6-v2": Space.LAST_LAYER,
    MODEL_1536: Space.LAYERS,
}

TEI_VERSION = "1.8.3"
_TEI_STATUS = {"Overloaded": 429, "Validation": 413, "Empty": 400}
TEI_BODY_BYTES = 2_000_000  # TEI's --payload-limit
TEI_CHARACTERS = 250 * MAX_TOKENS  # TEI counts no tokens beyond these

OPENAI_INPUTS = 2048
OPENAI_REQUEST_TOKENS = 300_000
OPENAI_BODY_BYTES = 64_000_000


@dataclass(frozen=True)
class Limits:
    """How much the server takes; the defaults are TEI's."""

    max_concurrent_requests: int = 512  # TEI counts a permit per input
    max_client_batch_size: int = 32
    max_openai_inputs: int = 8 * OPENAI_INPUTS  # waiting at once; OpenAI has rate limits instead


class _Permits:
    """How many inputs may wait at once."""

    def __init__(self, number: int) -> None:
        self._free = number

    def take(self, number: int) -> bool:
        if number > self._free:
            return False
        self._free -= number
        return True

    def give_back(self, number: int) -> None:
        self._free += number


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, media_type="application/json")


class _Refusal(HTTPException):
    """An error with the body that its dialect gives it."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class _Gone(Exception):  # noqa: N818
    """The client hung up, so its work was dropped."""


async def _answer(request: Request, future: "Future[Vectors]") -> Vectors:
    """Wait for the vectors, or for the client to hang up, which cancels them.

    A client that timed out asks again; embedding for the lost answer as well would double the
    work of a server that is already behind.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    vectors = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(hung_up())
    either: set[asyncio.Future[Any]] = {vectors, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not vectors.done():
            raise _Gone
        return vectors.result()
    finally:
        vectors.cancel()
        gone.cancel()


async def _read(request: Request, most: int) -> bytes | None:
    """The body, or None when it is longer than `most` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            return None
    return bytes(body)


class _Tei:
    """`POST /embed`, `GET /info`, `GET /health`."""

    def __init__(self, model: MiniLM, batcher: Batcher, limits: Limits) -> None:
        self._model = model
        self._batcher = batcher
        self._limits = limits
        self._permits = _Permits(limits.max_concurrent_requests)
        self._source = Source("tei", Space.LAST_LAYER)

    def routes(self) -> list[Route]:
        return [
            Route("/embed", self.embed, methods=["POST"]),
            Route("/", self.embed, methods=["POST"]),
            Route("/info", self.info),
            Route("/health", self.health),
        ]

    def _refuse(self, message: str, error_type: str) -> NoReturn:
        raise _Refusal(_json({"error": message, "error_type": error_type}, _TEI_STATUS[error_type]))

    def _malformed(self, status: int, message: str) -> NoReturn:
        """What TEI's web framework answers before TEI itself sees the request: plain text."""
        raise _Refusal(PlainTextResponse(message, status))

    async def health(self, _: Request) -> Response:
        return Response()

    async def info(self, _: Request) -> Response:
        return _json(
            {
                "model_id": MODEL_384,
                "model_sha": None,
                "model_dtype": "float32",
                "served_model_name": MODEL_384,
                "model_type": {"embedding": {"pooling": "mean"}},
                "max_concurrent_requests": self._limits.max_concurrent_requests,
                "max_input_length": MAX_TOKENS,
                "max_batch_tokens": BATCH_TOKENS,
                "max_batch_requests": None,
                "max_client_batch_size": self._limits.max_client_batch_size,
                "auto_truncate": False,
                "tokenization_workers": 1,
                "version": TEI_VERSION,
                "sha": None,
                "docker_label": "embedding_pipeline",
            }
        )

    async def embed(self, request: Request) -> Response:
        texts, truncate = self._parse(await _read(request, TEI_BODY_BYTES))
        if not self._permits.take(len(texts)):
            self._refuse("Model is overloaded", "Overloaded")
        try:
            for text in texts:
                if len(text) > TEI_CHARACTERS and not truncate:
                    self._invalid(
                        f"`inputs` must have less than {TEI_CHARACTERS} characters. "
                        f"Given: {len(text)}"
                    )
            texts = [text[:TEI_CHARACTERS] for text in texts]
            tokens = await asyncio.to_thread(self._model.tokenize, texts)
            for ids in tokens:
                if len(ids) > MAX_TOKENS and not truncate:
                    self._invalid(
                        f"`inputs` must have less than {MAX_TOKENS} tokens. Given: {len(ids)}"
                    )
            cut = [self._model.cut(ids) for ids in tokens]
            vectors = await _answer(request, self._batcher.submit(cut, self._source))
        finally:
            self._permits.give_back(len(texts))
        counted = {
            "x-compute-type": "cpu",
            "x-compute-characters": str(sum(map(len, texts))),
            "x-compute-tokens": str(sum(map(len, cut))),
        }
        return _json(vectors.tolist(), headers=counted)

    def _invalid(self, message: str) -> NoReturn:
        self._refuse(f"Input validation error: {message}", "Validation")

    def _parse(self, body: bytes | None) -> tuple[list[str], bool]:
        if body is None:
            self._malformed(413, "Failed to buffer the request body: length limit exceeded")
        try:
            content = from_json(body)
        except ValueError as error:
            self._malformed(400, f"Failed to parse the request body as JSON: {error}")
        wrong = "Failed to deserialize the JSON body into the target type: "
        if not isinstance(content, dict) or "inputs" not in content:
            self._malformed(422, wrong + "missing field `inputs`")
        inputs = content["inputs"]
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self._malformed(422, wrong + "inputs: this server takes a string or a list of strings")
        truncate = content.get("truncate")
        if truncate is not None and not isinstance(truncate, bool):
            self._malformed(422, wrong + "truncate: expected a boolean")
        if not texts:
            self._refuse("`inputs` cannot be empty", "Empty")
        if not all(texts):
            self._refuse("Input validation error: `inputs` cannot be empty", "Empty")
        if len(texts) > self._limits.max_client_batch_size:
            self._refuse(
                f"batch size {len(texts)} > maximum allowed batch size "
                f"{self._limits.max_client_batch_size}",
                "Validation",
            )
        # What would change the vectors must not be passed over in silence.
        unsupported = {
            "normalize": (None, True),
            "prompt_name": (None,),
            "truncation_direction": (None, "right", "Right"),
            "dimensions": (None, Space.LAST_LAYER.dimensions),
        }
        for name, supported in unsupported.items():
            if content.get(name) not in supported:
                self._invalid(f"this server does not support `{name}`: {content[name]!r}")
        return texts, bool(truncate)


class _OpenAI:
    """`POST /v1/embeddings`, `GET /v1/models`."""

    def __init__(self, model: MiniLM, batcher: Batcher, limits: Limits) -> None:
        self._model = model
        self._batcher = batcher
        self._permits = _Permits(limits.max_openai_inputs)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.one_model),
        ]

    def _refuse(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> NoReturn:
        error = {"message": message, "type": kind, "param": param, "code": code}
        raise _Refusal(_json({"error": error}, status, headers))

    def _model_object(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": 0, "owned_by": "embedding_pipeline"}

    def _space(self, model: object) -> Space:
        if not isinstance(model, str) or not model:
            self._refuse("you must provide a model parameter", param="model")
        if model not in OPENAI_MODELS:
            self._refuse(
                f"The model `{model}` does not exist or you do not have access to it. "
                f"This server has: {', '.join(OPENAI_MODELS)}.",
                status=404,
                code="model_not_found",
            )
        return OPENAI_MODELS[model]

    async def models(self, _: Request) -> Response:
        return _json(
            {"object": "list", "data": [self._model_object(model) for model in OPENAI_MODELS]}
        )

    async def one_model(self, request: Request) -> Response:
        model = request.path_params["model"]
        self._space(model)
        return _json(self._model_object(model))

    async def embeddings(self, request: Request) -> Response:
        content = self._content(await _read(request, OPENAI_BODY_BYTES))
        space = self._space(content.get("model"))
        texts = self._texts(content.get("input"))
        encoding = content.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            self._refuse(
                f"Invalid value: '{encoding}'. Supported values are: 'float' and 'base64'.",
                param="encoding_format",
                code="invalid_value",
            )
        if content.get("dimensions") not in (None, space.dimensions):
            self._refuse(
                f"This model does not support specifying dimensions other than {space.dimensions}.",
                param="dimensions",
            )
        if not self._permits.take(len(texts)):
            self._refuse(
                "Rate limit reached: too many inputs are waiting.",
                status=429,
                kind="requests",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        try:
            tokens = await asyncio.to_thread(self._model.tokenize, texts)
            lengths = [len(ids) for ids in tokens]
            if (longest := max(lengths)) > MAX_TOKENS:
                self._refuse(
                    f"This model's maximum context length is {MAX_TOKENS} tokens, however you "
                    f"requested {longest} tokens ({longest} in your prompt; 0 for the "
                    f"completion). Please reduce your prompt; or completion length.",
                    param="input",
                    code="context_length_exceeded",
                )
            if (total := sum(lengths)) > OPENAI_REQUEST_TOKENS:
                self._refuse(
                    f"Requested {total} tokens, max {OPENAI_REQUEST_TOKENS} tokens per request",
                    kind="max_tokens_per_request",
                    code="max_tokens_per_request",
                )
            future = self._batcher.submit(tokens, Source("openai", space))
            vectors = await _answer(request, future)
        finally:
            self._permits.give_back(len(texts))
        if encoding == "base64":
            little_endian = vectors.astype("<f4", copy=False)
            rows: Sequence[Any] = [base64.b64encode(row).decode() for row in little_endian]
        else:
            rows = vectors.tolist()
        return _json(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": row}
                    for index, row in enumerate(rows)
                ],
                "model": content["model"],
                "usage": {"prompt_tokens": total, "total_tokens": total},
            }
        )

    def _content(self, body: bytes | None) -> dict[str, Any]:
        if body is None:
            self._refuse(f"The request is longer than {OPENAI_BODY_BYTES} bytes.", status=413)
        try:
            content = from_json(body)
        except ValueError as error:
            self._refuse(f"We could not parse the JSON body of your request: {error}")
        if not isinstance(content, dict):
            self._refuse("The JSON body of your request must be an object.")
        return content

    def _texts(self, value: object) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list):
            self._refuse("'input' must be a string or an array of strings.", param="input")
        if not texts:
            self._refuse(
                "Invalid 'input': empty array. Expected an array with minimum length 1, "
                "but got an empty array instead.",
                param="input",
                code="empty_array",
            )
        if any(isinstance(text, int | list) for text in texts):
            self._refuse(
                "Invalid 'input': this server takes strings, not token arrays.", param="input"
            )
        if not all(isinstance(text, str) and text for text in texts):
            self._refuse(
                "'$.input' is invalid. Please check the API reference: "
                "https://platform.openai.com/docs/api-reference.",
            )
        if len(texts) > OPENAI_INPUTS:
            self._refuse(
                f"Invalid 'input': array too long. Expected an array with maximum length "
                f"{OPENAI_INPUTS}, but got an array with length {len(texts)} instead.",
                param="input",
                code="array_above_max_length",
            )
        return texts


def _stats(batcher: Batcher) -> Callable[[Request], Awaitable[Response]]:
    async def stats(_: Request) -> Response:
        total = {"requests": 0, "inputs": 0, "tokens": 0}
        dialects: dict[str, dict[str, dict[str, int]]] = {"tei": {}, "openai": {}}
        for source, counts in batcher.counts().items():
            dialects[source.dialect][str(source.space.dimensions)] = counts
            for name, number in counts.items():
                total[name] += number
        return _json({"total": total, "dialects": dialects})

    return stats


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, _Refusal)
    return error.response


async def _failed(request: Request, error: Exception) -> Response:
    _log.error("the model failed: %s", error)
    if request.url.path.startswith("/v1/"):
        body = {"message": f"The server had an error: {error}", "type": "server_error"}
        return _json({"error": {**body, "param": None, "code": None}}, 500)
    return _json({"error": f"Backend error: {error}", "error_type": "Backend"}, 424)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def application(model: MiniLM, batcher: Batcher, limits: Limits) -> Starlette:
    """Both dialects, and `GET /stats`: what the model has run since the server started.

    `/stats` answers `{"total": {requests, inputs, tokens}, "dialects": {"tei": {"384": {…}},
    "openai": {"384": {…}, "1536": {…}}}}`; a dialect's width appears once it was asked for.
    """
    return Starlette(
        routes=[
            *_Tei(model, batcher, limits).routes(),
            *_OpenAI(model, batcher, limits).routes(),
            Route("/stats", _stats(batcher)),
        ],
        exception_handlers={
            _Refusal: _refused,
            ModelFailureError: _failed,
            _Gone: _gone,
        },
    )
