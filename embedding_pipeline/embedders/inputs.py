"""Texts on their way into requests: what is refused before sending, what is cut, what it weighs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic_core import to_json

from embedding_pipeline.embedders.packing import Weight
from embedding_pipeline.embedders.port import Endpoint, Overlong
from embedding_pipeline.embedders.tokens import TokenCounter

LONGEST_CHARACTER = 6
"""Bytes of JSON: `\\u0000`. UTF-8 takes four at most."""


@dataclass(frozen=True)
class Rules:
    """What a column's YAML and its endpoint say about texts."""

    endpoint: Endpoint
    counter: TokenCounter
    overlong: Overlong
    prefix: str

    @property
    def most_tokens(self) -> int:
        """Of one text."""
        return self.endpoint.max_tokens_per_input


@dataclass
class Inputs:
    """Texts as they are sent, by their index in the call."""

    texts: dict[int, str] = field(default_factory=dict)
    weights: dict[int, Weight] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    weigh_exactly: bool = True
    """Whether bytes are counted as they are sent; else bounded, which costs nothing."""

    def put(self, index: int, text: str, tokens: int) -> None:
        """This text is sent for that index."""
        self.texts[index] = text
        size = len(to_json(text)) if self.weigh_exactly else _most_bytes(text)
        self.weights[index] = Weight(tokens, size + len(","))


def prepare(texts: Sequence[str], rules: Rules) -> Inputs:
    """Refuse what must not be sent, cut or refuse what is too long, weigh the rest.

    Blank texts are refused because OpenAI answers a whole request 400 for one of them.
    """
    most = sum(map(_most_bytes, texts)) + len(texts) * len(rules.prefix + ",") * LONGEST_CHARACTER
    inputs = Inputs(weigh_exactly=most > rules.endpoint.max_bytes_per_request)
    for index, text in enumerate(texts):
        if not text.strip():
            inputs.refused[index] = "not sent: the text is empty or blank"
        elif _has_half_a_pair(text):
            inputs.refused[index] = "not sent: half of a surrogate pair, which is not Unicode text"
        else:
            _prepare_one(inputs, index, rules.prefix + text, rules)
    return inputs


def _prepare_one(inputs: Inputs, index: int, text: str, rules: Rules) -> None:
    cut = rules.counter.cut(text, rules.most_tokens)
    if not cut.overlong:
        inputs.put(index, text, cut.tokens)
    elif rules.overlong == "truncate":
        inputs.put(index, cut.text, cut.tokens)
        inputs.truncated.append(index)
    elif rules.counter.exact:
        inputs.refused[index] = (
            f"not sent: longer than {rules.most_tokens} tokens, and the column's YAML says "
            "overlong: quarantine"
        )
        return
    else:
        # only an estimate: the provider decides, in a request of its own
        inputs.put(index, text, rules.endpoint.max_tokens_per_request)
    size, most = inputs.weights[index].bytes, rules.endpoint.max_bytes_per_request
    if size > most:
        del inputs.texts[index], inputs.weights[index]
        inputs.refused[index] = (
            f"not sent: {size} bytes, {rules.endpoint.name} takes at most {most} a request"
        )


_TOO_LONG = re.compile(r"token|length|too long", re.IGNORECASE)
_COUNTED = re.compile(r"(\d{1,12}) tokens|given: (\d{1,12})", re.IGNORECASE)


def shorten(inputs: Inputs, index: int, words: str, rules: Rules) -> bool:
    """Cut a text further that the provider finds too long where our count did not.

    By the provider's own count where its words name it ("… requested 8610 tokens", "Given: 300"),
    else by a quarter. False where that is not the trouble or the YAML does not say truncate.
    """
    if rules.overlong != "truncate" or not _TOO_LONG.search(words):
        return False
    text = inputs.texts[index]
    counted = max((int(n) for pair in _COUNTED.findall(words) for n in pair if n), default=0)
    share = min(0.75, 0.98 * rules.most_tokens / counted) if counted > rules.most_tokens else 0.75
    shorter = text[: int(share * len(text))]
    if not shorter.strip() or rules.counter.roughly(shorter) < rules.most_tokens // 8:
        return False
    inputs.put(index, shorter, rules.counter.roughly(shorter))
    if index not in inputs.truncated:
        inputs.truncated.append(index)
    return True


def _most_bytes(text: str) -> int:
    return LONGEST_CHARACTER * len(text) + len('""')


def _has_half_a_pair(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
