"""Rows to embed, and the one vector that each text has.

Texts are 100 to 200 words of the shipped sample rows' sentences, unique through their number. A
text's vector follows from its bytes alone, so that whoever has the text knows the truth: the
endpoint answers with it and the check works it out again.
"""

import json
import random
import zlib
from functools import cache
from uuid import UUID

import numpy as np

from embedding_pipeline.local.samples import FOLDER as SAMPLE_ROWS

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]

BASES = 1024
"""Precomputed vectors; a text has one of them with its own first three values."""
OWN_VALUES = 3
"""Values at a vector's head that depend on the whole text: 12 bytes, 16 base64 characters."""


@cache
def _sentences() -> list[str]:
    lines = (SAMPLE_ROWS / "bora_docs.jsonl").read_text(encoding="utf-8").splitlines()
    found = [s.strip() for line in lines for s in json.loads(line)["content"].split(". ")]
    return [sentence.rstrip(".") for sentence in found if len(sentence.split()) > 5]


def text(number: int, revision: int = 0) -> str:
    """Row `number`'s text, 100 to 200 words; another one with each revision."""
    draw = random.Random(number * 7919 + revision)
    sentences = _sentences()
    words = [f"Document {number}, revision {revision}"]
    length, most = 4, draw.randint(120, 185)
    while length < most:
        sentence = sentences[draw.randrange(len(sentences))]
        words.append(sentence)
        length += sentence.count(" ") + 1
    return " ".join(". ".join(words).split()[:200])


def short_text(number: int) -> str:
    """A dozen words, for parts in which the text's length does not matter."""
    return f"Row {number} has a short text, and a short text is all that it needs."


def uuid_key(number: int) -> UUID:
    """A key without an order, the same for a number each time."""
    return UUID(int=(number * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 1) % (1 << 128))


@cache
def bases(dimensions: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """float32 (BASES, dimensions), about unit length."""
    drawn = np.random.default_rng(dimensions).standard_normal((BASES, dimensions))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return np.ascontiguousarray(drawn, dtype=np.float32)


def own_values(data: bytes) -> Vector:
    """The first values of a text's vector, small against its length of one, exact in float32."""
    digest = zlib.crc32(data)
    return np.array(
        [(digest & 0xFFFF) / 2**19, (digest >> 16) / 2**19, (zlib.adler32(data) & 0xFFFF) / 2**19],
        dtype=np.float32,
    )


def base_of(data: bytes) -> int:
    """Which of the precomputed vectors a text has."""
    return zlib.crc32(data) % BASES


def vector_of(text: str, dimensions: int) -> Vector:
    """The truth: float32 (dimensions,)."""
    data = text.encode()
    vector: Vector = bases(dimensions)[base_of(data)].copy()
    vector[:OWN_VALUES] = own_values(data)
    return vector
