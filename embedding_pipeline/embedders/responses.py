"""What a provider's answer means: an error of one of the three kinds, or checked vectors.

Status codes: OpenAI's error guide (platform.openai.com/docs/guides/error-codes) and TEI's
router (429 Overloaded, 424 Backend, 422 Tokenizer, 413 Validation, 400 Empty, 503 Unhealthy).
"""

import base64
import binascii
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np

from embedding_pipeline.embedders.errors import (
    EmbedError,
    GlobalError,
    InputError,
    TransientError,
    provider_words,
)
from embedding_pipeline.embedders.port import Endpoint, Vectors

INPUT_STATUSES = frozenset({400, 413, 422})
TRANSIENT_STATUSES = frozenset({408, 409, 423, 424, 425, 429})
GLOBAL_CODES = frozenset(
    {
        # OpenAI answers 429 or 400 with these; no waiting and no halving helps
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "account_deactivated",
        "invalid_api_key",
        "model_not_found",
        "unsupported_model",
    }
)


@dataclass
class Answer:
    """One request's checked answer."""

    vectors: Vectors
    tokens: int | None
    """None: the provider did not say."""
    headers: Mapping[str, str] = field(default_factory=dict)


def error_for_status(
    endpoint: Endpoint, model: str, status: int, headers: Mapping[str, str], body: bytes
) -> EmbedError:
    """The error that an answer with this status (not 2xx) stands for."""
    text, code = _error_text(body)
    words = provider_words(text, endpoint.api_key) or "(no words)"
    said = f"{endpoint.name} answered {status}: {words}"
    if code in GLOBAL_CODES or status in (401, 402, 403, 404):
        return GlobalError(f"{said}\n{_remedy(endpoint, model, status, code)}")
    if 300 <= status < 400:
        target = provider_words(headers.get("location", "elsewhere"))
        return GlobalError(
            f"{endpoint.name} at {endpoint.base_url} redirects to {target}; "
            "write the address that it should be asked at (keys are never sent along a redirect)"
        )
    if status in INPUT_STATUSES:
        return InputError(f"{status}: {words}")
    if status == 429:
        return TransientError(said, cause="throttled", retry_after=retry_after(headers))
    if status == 408:
        return TransientError(said, cause="timeout", retry_after=retry_after(headers))
    if status >= 500 or status in TRANSIENT_STATUSES:
        return TransientError(said, cause="server", retry_after=retry_after(headers))
    return GlobalError(f"{said}\n{_remedy(endpoint, model, status, code)}")


def _remedy(endpoint: Endpoint, model: str, status: int, code: str | None) -> str:
    if code in ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"):
        return "The account has no credit left or a spending limit is reached; raise it, then rerun"
    if status in (401, 403) or code in ("invalid_api_key", "account_deactivated"):
        if endpoint.api_key is None:
            return f"No key is set for {endpoint.name}; set the variable that holds its key"
        return f"The key set for {endpoint.name} is not accepted there; set a valid one"
    if status == 404 or code in ("model_not_found", "unsupported_model"):
        return (
            f"Either {endpoint.base_url} is not the address of a {endpoint.dialect} endpoint "
            f"or it does not serve {model}; mend the address or the model's name"
        )
    return f"{endpoint.base_url} does not take this request; is it a {endpoint.dialect} endpoint?"


def _error_text(body: bytes) -> tuple[str, str | None]:
    """Words and code from `{"error": {"message", "code", "type"}}` or TEI's `{"error", …}`."""
    text = body.decode("utf-8", "replace")
    try:
        parsed = json.loads(text)
    except ValueError:
        return text, None
    if not isinstance(parsed, dict):
        return text, None
    error = parsed.get("error", parsed)
    if isinstance(error, dict):
        codes = [c for c in (error.get("code"), error.get("type")) if isinstance(c, str)]
        code = next((c for c in codes if c in GLOBAL_CODES), codes[0] if codes else None)
        message = error.get("message")
        return (message if isinstance(message, str) else text), code
    return (error if isinstance(error, str) else text), None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `Retry-After` (seconds or an HTTP date)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if np.isfinite(seconds):
            return max(0.0, seconds)
    return None


def parse_json(endpoint: Endpoint, body: bytes) -> Any:
    """The body as JSON; a body that is not is a bad response."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise TransientError(
            f"{endpoint.name} answered with a body that is not JSON ({len(body)} bytes)",
            cause="response",
        ) from error


def decode_base64(endpoint: Endpoint, encoded: object) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Little-endian float32 from base64, as OpenAI's `encoding_format="base64"` sends them."""
    if not isinstance(encoded, str):
        raise TransientError(
            f"{endpoint.name} answered with an embedding of type {type(encoded).__name__}",
            cause="response",
        )
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TransientError(
            f"{endpoint.name} answered with broken base64", cause="response"
        ) from error
    if len(raw) % 4:
        raise TransientError(
            f"{endpoint.name} answered with base64 of {len(raw)} bytes, not a whole number of "
            "float32",
            cause="response",
        )
    return np.frombuffer(raw, dtype="<f4")


def check_count(endpoint: Endpoint, got: int, expected: int) -> None:
    """One vector for each input."""
    if got != expected:
        raise TransientError(
            f"{endpoint.name} answered with {got} vectors for {expected} inputs", cause="response"
        )


def check_model(endpoint: Endpoint, model: str, said: object) -> None:
    """The answer must name the column's model or one of its aliases."""
    if not isinstance(said, str) or not said:
        raise TransientError(f"{endpoint.name} answered without naming its model", cause="response")
    if said.casefold() not in endpoint.names_of(model):
        other = provider_words(said, endpoint.api_key)
        raise GlobalError(
            f"{endpoint.name} at {endpoint.base_url} serves {other}, not {model}; vectors of two "
            f"models cannot be compared. Point {endpoint.name} at a server of {model}, or, if "
            f"{other} is another name for the same weights, list it under model_aliases of "
            f"{endpoint.name} in providers.yaml"
        )


def check_vectors(endpoint: Endpoint, model: str, rows: Sequence[Any], dimensions: int) -> Vectors:
    """Stack the rows; refuse a wrong width, NaN, Inf and zero vectors."""
    try:
        widths = [len(row) for row in rows]
        wrong = any(width != dimensions for width in widths)
        if wrong and len(set(widths)) == 1:
            raise GlobalError(
                f"{endpoint.name} answered with {widths[0]} dimensions for {model}, the column has "
                f"{dimensions}; write dimensions: {widths[0]} (a new column), or name the model "
                f"that gives {dimensions}"
            )
        if wrong:
            raise TransientError(
                f"{endpoint.name} answered with vectors of different widths: "
                f"{sorted(set(widths))}, expected {dimensions}",
                cause="response",
            )
        with np.errstate(over="ignore"):
            vectors: Vectors = np.asarray(rows, dtype=np.float32).reshape(len(rows), dimensions)
    except (TypeError, ValueError, OverflowError) as error:
        raise TransientError(
            f"{endpoint.name} answered with something that is not a list of numbers",
            cause="response",
        ) from error
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise TransientError(
            f"{endpoint.name} answered with NaN or infinity in {int((~finite).sum())} of "
            f"{len(vectors)} vectors",
            cause="response",
        )
    filled = vectors.any(axis=1)
    if not filled.all():
        raise TransientError(
            f"{endpoint.name} answered with all-zero vectors for {int((~filled).sum())} of "
            f"{len(vectors)} inputs; a zero vector has no direction and cosine search loses it",
            cause="response",
        )
    return vectors
