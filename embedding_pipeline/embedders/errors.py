"""Three kinds of failed embedding, each with its own treatment, and the words they carry."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from embedding_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from embedding_pipeline.embedders.port import EmbedResult

Cause = Literal["throttled", "unreachable", "timeout", "broken", "server", "response"]
"""Why a request failed in a way that may pass:

- throttled: 429; the endpoint has too much to do, whoever asks
- unreachable: no connection (refused, no such host)
- timeout, broken: sent, but no whole answer came back (408, timeout, reset, half a response)
- server: 5xx and TEI's 424
- response: answered, but not with what was asked for (count, order, width, values)
"""


class EmbedError(PipelineError):
    """An `embed` call that could not finish.

    `partial` holds what it had finished by then (`EmbedResult.done` says which rows): those
    vectors are paid for, write them.
    """

    partial: "EmbedResult | None" = None


class TransientError(EmbedError):
    """May pass: retried with back-off. Reaches a caller when the time to retry is used up."""

    def __init__(
        self, message: str, *, cause: Cause = "server", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class GlobalError(EmbedError):
    """Would meet every text alike (key, model, width, quota): stop, charge no row."""


class InputError(EmbedError):
    """The provider refuses these inputs; `words` is what it said.

    `embed` halves the request until the culprit stands alone and reports it in
    `EmbedResult.refused`; callers of `embed` never see this error.
    """

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


MAX_WORDS = 500
"""Characters of a provider's words that are kept."""

_KEY_LIKE = re.compile(r"\b(?:sk|pk|hf|xai|gsk)[-_][A-Za-z0-9*_-]{6,}")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def provider_words(text: str, secrets: Iterable[str] = ()) -> str:
    """What a provider said, fit for a log line and a Postgres text column.

    At most MAX_WORDS characters on one line, without control characters and lone surrogates,
    and without the secrets: providers quote keys back ("Incorrect API key provided: sk-…").
    """
    for secret in secrets:
        text = text.replace(secret, "[key]")
    # the key first: cutting might leave half of one that no longer matches
    text = _KEY_LIKE.sub("[key]", text[: 20 * MAX_WORDS])
    text = " ".join(_UNPRINTABLE.sub(" ", text).split())
    return text if len(text) <= MAX_WORDS else text[: MAX_WORDS - 1] + "…"
