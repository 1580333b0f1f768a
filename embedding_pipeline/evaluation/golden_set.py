"""Golden sets: queries with the keys of the rows that should be found, one JSON object a line."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from embedding_pipeline.errors import SpecError
from embedding_pipeline.evaluation.keys import Key, key_text
from embedding_pipeline.spec import TableSpec, as_json

_FIELDS = ("query", "expected", "tenant")
_EXAMPLE = '{"query": "how do I reset my password", "expected": [17], "tenant": "acme"}'


@dataclass(frozen=True)
class GoldenQuery:
    """A query as people ask it, with the rows that answer it."""

    query: str
    expected: tuple[Key, ...]
    tenant: str | None = None
    line: int = field(default=0, compare=False)
    """Where the file says so, from 1; for messages."""


@dataclass(frozen=True)
class GoldenSet:
    """The queries of one file."""

    queries: tuple[GoldenQuery, ...]
    path: Path | None = field(default=None, compare=False)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what the set asks for; neither the order nor the layout matters."""
        lines = sorted(
            as_json([each.query, sorted(map(key_text, each.expected)), each.tenant])
            for each in self.queries
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.queries)


def load_golden_set(path: Path | str, table: TableSpec | None = None) -> GoldenSet:
    """Read a golden set; SpecError names the file, the line and the remedy.

    With `table`, a key must have as many parts as the table's key, and a tenant is refused
    where the table has no `tenant_column`. Without it, all keys of the file must have as many
    parts as the first.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"{path}: cannot read the golden set: {error.strerror}; "
            "create the file or take `golden_set` out of the table's YAML"
        ) from None
    reader = _Reader(path, table)
    # by newline only: str.splitlines would also cut at U+2028, which JSON strings may hold
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            reader.read(number, line)
    if not reader.queries:
        raise SpecError(f"{path}: the golden set is empty; write at least one line like {_EXAMPLE}")
    return GoldenSet(tuple(reader.queries), path)


class _Reader:
    def __init__(self, path: Path, table: TableSpec | None) -> None:
        self.path = path
        self.table = table
        self.queries: list[GoldenQuery] = []
        self._arity = len(table.key_columns) if table else None
        self._first_seen: dict[tuple[str, str | None], int] = {}
        self._line = 0

    def read(self, number: int, line: bytes) -> None:
        self._line = number
        entry = self._entry(line)
        query = self._text("query", entry.get("query"))
        tenant = None
        if entry.get("tenant") is not None:
            tenant = self._text("tenant", entry["tenant"])
            if self.table is not None and self.table.tenant_column is None:
                self._refuse(
                    f'"tenant" is given, but {self.table.table} has no tenant_column; '
                    "name it in the table's YAML or leave the tenant out"
                )
        expected = self._expected(entry.get("expected"))
        before = self._first_seen.setdefault((query, tenant), number)
        if before != number:
            whose = f" for tenant {tenant!r}" if tenant is not None else ""
            self._refuse(
                f"the query is already on line {before}{whose}; "
                'keep one line and list every right row in its "expected"'
            )
        self.queries.append(GoldenQuery(query, expected, tenant, number))

    def _entry(self, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(
                line.decode(),
                parse_float=str,
                parse_constant=self._constant,
                object_pairs_hook=self._object,
            )
        except UnicodeDecodeError:
            self._refuse("is not UTF-8; save the file as UTF-8")
        except json.JSONDecodeError as error:
            self._refuse(
                f"is not JSON ({error.msg}, column {error.colno}); "
                f"write one object a line, like {_EXAMPLE}"
            )
        except RecursionError:
            self._refuse(f"is nested too deeply; write one object a line, like {_EXAMPLE}")
        if not isinstance(entry, dict):
            self._refuse(f"is not a JSON object; write one a line, like {_EXAMPLE}")
        for name in entry:
            if name not in _FIELDS:
                self._refuse(f"unknown field {name!r}; a line has {', '.join(_FIELDS)}")
        return entry

    def _constant(self, constant: str) -> NoReturn:
        self._refuse(f"{constant} is not JSON; write a number or a string")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            self._refuse(f"the field {twice[0]!r} stands there twice; keep one")
        return dict(pairs)

    def _expected(self, value: Any) -> tuple[Key, ...]:
        if not isinstance(value, list) or not value:
            self._refuse(
                '"expected" must list at least one key of a row that answers the query, '
                f"like {_EXAMPLE}"
            )
        keys = tuple(self._key(each) for each in value)
        if len(set(map(key_text, keys))) != len(keys):
            self._refuse('"expected" names a key twice; keep one')
        return keys

    def _key(self, value: Any) -> Key:
        parts: Sequence[Any] = value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, str):
                self._storable("expected", part)
            elif not isinstance(part, int):  # bool is an int; fractions came as strings
                self._refuse(
                    f'"expected" has {_shortened(as_json(part))} for a key; '
                    "a key is a string or a number, or a list of them for a composite key"
                )
        if self._arity is None:
            self._arity = max(len(parts), 1)
        if len(parts) != self._arity:
            names = f" ({', '.join(self.table.key_columns)})" if self.table else ""
            form = (
                "write the value itself, as in [17]"
                if self._arity == 1
                else f"write each key as a list of {self._arity}, as in "
                + as_json([[*"abcdefgh"[: self._arity]]])
            )
            self._refuse(
                f"the key {_shortened(as_json(value))} has {len(parts)} "
                f"{'part' if len(parts) == 1 else 'parts'}, the table's key has "
                f"{self._arity}{names}; {form}"
            )
        return tuple(parts)

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            given = "is missing" if value is None else f"is {_shortened(as_json(value))}"
            self._refuse(f'"{name}" {given}; write it as a string, like {_EXAMPLE}')
        if not value or value.isspace():
            self._refuse(f'"{name}" is empty; write it, or delete the line')
        self._storable(name, value)
        return value

    def _storable(self, name: str, value: str) -> None:
        if "\0" in value:
            self._refuse(f'"{name}" holds a NUL (\\u0000), which Postgres cannot store; delete it')
        if any("\ud800" <= char <= "\udfff" for char in value):
            self._refuse(
                f'"{name}" holds half a surrogate pair (a \\ud8xx without its \\udcxx); '
                "write the character itself"
            )

    def _refuse(self, problem: str) -> NoReturn:
        raise SpecError(f"{self.path}:{self._line}: {problem}")


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
