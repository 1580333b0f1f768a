"""What a run remembers so that it pays for no text twice, within a fixed number of bytes."""

from collections import OrderedDict
from itertools import filterfalse
from typing import Any

import numpy as np

REMEMBERED_BYTES = 16 * 1024 * 1024
"""Of recent vectors kept for equal texts, and as much again for rows that were locked."""
REMEMBERED_PLACES = 30_000
"""Texts of which a run remembers in which row their vector is, once the vector is forgotten: 9 MB,
so that a run over a million rows needs as much memory as one over ten thousand."""

Vector = np.ndarray[Any, np.dtype[np.float32]]


class Memory:
    """Vectors and refusals of this run, by the text's fingerprint."""

    def __init__(self, dimensions: int) -> None:
        self.most = max(256, REMEMBERED_BYTES // (4 * dimensions))
        self.recent: OrderedDict[bytes, Vector] = OrderedDict()
        self.unwritten: set[bytes] = set()
        """On their way into the table: until they are written nobody else could recall them."""
        self.page: set[bytes] = set()
        """Of the page being handed on: what was at hand when it was read must stay so."""
        self.locked: dict[bytes, tuple[Vector, str]] = {}
        """Not written because somebody held the row, and what the row counts as."""
        self.given_up: set[bytes] = set()
        """The same, but without room for the vector: such rows are left to the next run."""
        self._places: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        self.refused: dict[bytes, str] = {}

    def vector(self, fingerprint: bytes) -> tuple[Vector, str] | None:
        """A text's vector, if it is at hand, and what a row counts as that is given it."""
        if self.locked and (locked := self.locked.get(fingerprint)) is not None:
            return locked
        if (vector := self.recent.get(fingerprint)) is None:
            return None
        if vector.base is not None:
            # a part of its answer, which must not be kept for as long as this one is asked for
            vector = self.recent[fingerprint] = vector.copy()
        self.recent.move_to_end(fingerprint)
        return vector, "reused"

    def keep(self, fingerprint: bytes, vector: Vector) -> None:
        """Remember a vector; the oldest that may be forgotten makes room for it.

        It may be a row of an answer: those come and go together, so the whole answer does too.
        """
        self.recent[fingerprint] = vector
        self.recent.move_to_end(fingerprint)
        while len(self.recent) > self.most:
            oldest = next(filterfalse(self._is_needed, self.recent), None)
            if oldest is None:
                return
            del self.recent[oldest]

    def _is_needed(self, fingerprint: bytes) -> bool:
        return fingerprint in self.unwritten or fingerprint in self.page

    def keep_locked(self, fingerprint: bytes, vector: Vector, kind: str) -> None:
        """Remember a vector that could not be written, as far as there is room."""
        if len(self.locked) < self.most:
            self.locked.setdefault(fingerprint, (vector.copy(), kind))
        elif fingerprint not in self.locked:
            self.given_up.add(fingerprint)

    def written(self, fingerprint: bytes, key: tuple[str, ...]) -> None:
        """A row has this vector now: it can be recalled from there."""
        if self.locked and (locked := self.locked.pop(fingerprint, None)) is not None:
            self.keep(fingerprint, locked[0])
        self._places[fingerprint] = key
        if len(self._places) > REMEMBERED_PLACES:
            self._places.popitem(last=False)

    def place(self, fingerprint: bytes) -> tuple[str, ...] | None:
        """The key of a row that this run has given the text's vector."""
        return self._places.get(fingerprint)
