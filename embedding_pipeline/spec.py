"""What a table's YAML says, typed and checked: tables, embedding columns, recipes, partitions.

Nothing here knows Dagster or the database. `spec_files.py` reads these from `defs.yaml`.
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RECIPE_VERSION = 1
"""Part of every recipe: raised when this project itself turns texts into vectors differently."""

KNOWN_WIDTHS: dict[str, tuple[int, int]] = {
    # model: (narrowest, widest) embedding that it can give
    "text-embedding-3-small": (1, 1536),
    "text-embedding-3-large": (1, 3072),
    "text-embedding-ada-002": (1536, 1536),
    "sentence-transformers/all-MiniLM-L6-v2": (384, 384),
    "all-minilm-l6-v2-layers": (1536, 1536),
}
"""Widths published by the vendors (OpenAI's embeddings guide, the models' cards)."""

HNSW_MAX_DIMENSIONS = 2000
"""pgvector's limit for an HNSW index on the `vector` type (pgvector README, "HNSW")."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)


Identifier = Annotated[str, Field(min_length=1, max_length=63)]


class HashPartitions(_Strict):
    """A fixed number of buckets by a hash of the key; for tables without a natural partition."""

    by: Literal["hash"]
    buckets: int = Field(8, ge=1, le=1024)


class ColumnPartitions(_Strict):
    """One partition for each value of a column, following the data."""

    by: Literal["column"]
    column: Identifier


class MonthPartitions(_Strict):
    """One partition for each month (UTC) of a date or timestamp column, following the data."""

    by: Literal["month"]
    column: Identifier


Partitions = Annotated[
    HashPartitions | ColumnPartitions | MonthPartitions, Field(discriminator="by")
]


class EmbeddingSpec(_Strict):
    """One embedding column: which model fills it and what is expected of it."""

    column: Identifier
    dimensions: int = Field(ge=1, le=HNSW_MAX_DIMENSIONS)
    provider: str = Field(min_length=1)
    model: str = Field(min_length=1)
    baseline: str | None = None
    prefix: str = ""
    overlong: Literal["truncate", "quarantine"] = "truncate"
    reuse: bool = False
    mrr_floor: float = Field(0.3, ge=0, le=1)
    baseline_ratio: float = Field(0.9, gt=0, le=2)
    recall_floor: float = Field(0.9, ge=0, le=1)
    max_pending_minutes: float = Field(60, gt=0)
    max_quarantined_share: float = Field(0.01, ge=0, le=1)
    batch_size: int = Field(64, ge=1, le=2048)
    concurrency: int = Field(8, ge=1, le=256)

    @model_validator(mode="after")
    def _width_fits_model(self) -> Self:
        known = KNOWN_WIDTHS.get(self.model)
        if known and not known[0] <= self.dimensions <= known[1]:
            gives = str(known[1]) if known[0] == known[1] else f"{known[0]} to {known[1]}"
            raise ValueError(
                f"column {self.column}: {self.model} gives {gives} dimensions, "
                f"not {self.dimensions}; write dimensions: {known[1]} or name another model"
            )
        return self

    @property
    def recipe(self) -> str:
        """What turns a text into this column's vector, as one canonical line.

        It is a literal in the pending predicate, so equal recipes must be equal strings.
        """
        return json.dumps(
            {
                "recipe": RECIPE_VERSION,
                "model": self.model,
                "dimensions": self.dimensions,
                "prefix": self.prefix,
                "overlong": self.overlong,
            },
            ensure_ascii=True,
            sort_keys=True,
            separators=(",", ":"),
        )

    @property
    def fingerprint_column(self) -> str:
        """Name of the column that holds the fingerprint, ≤ 63 bytes (see `short_name`)."""
        return short_name(self.column, "fingerprint")


class TableSpec(_Strict):
    """One source table with its embedding columns."""

    table: str = Field(min_length=1)
    id_column: Identifier | list[Identifier] = "id"
    text: str = Field(min_length=1)
    eligible: str | None = Field(None, min_length=1)
    tenant_column: Identifier | None = None
    partitions: Partitions = HashPartitions(by="hash")
    embeddings: list[EmbeddingSpec] = Field(min_length=1)
    golden_set: str | None = None
    owners: list[str] = []
    description: str | None = None
    rows_per_run: int = Field(100_000, ge=1)

    @field_validator("id_column")
    @classmethod
    def _some_key(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("needs at least one column: the table's primary key")
        if isinstance(value, list) and len(set(value)) != len(value):
            raise ValueError("names a column twice")
        return value

    @model_validator(mode="after")
    def _columns_fit_together(self) -> Self:
        names = [embedding.column for embedding in self.embeddings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"embeddings: two entries are named {twice[0]!r}; a column holds one model's "
                "vectors only, so give each its own column"
            )
        for embedding in self.embeddings:
            if embedding.baseline is None:
                continue
            if embedding.baseline == embedding.column:
                raise ValueError(f"embeddings: {embedding.column} is its own baseline")
            if embedding.baseline not in names:
                raise ValueError(
                    f"embeddings: {embedding.column} names the baseline {embedding.baseline!r}, "
                    f"which is not a column of this table; known: {', '.join(names)}"
                )
        taken = {*self.key_columns, self.tenant_column, getattr(self.partitions, "column", None)}
        for name in names:
            if name in taken:
                raise ValueError(f"embeddings: {name!r} is also named as a key or partition column")
        return self

    @property
    def key_columns(self) -> list[str]:
        """The primary key's columns, in order."""
        return [self.id_column] if isinstance(self.id_column, str) else list(self.id_column)

    @property
    def qualified(self) -> "QualifiedName":
        """Schema (None: whatever the search path finds) and table name."""
        return QualifiedName.parse(self.table)

    @property
    def asset_name(self) -> str:
        """The table's name as Dagster accepts it, reversibly (see `dagster_name`)."""
        return dagster_name(self.table)

    def embedding(self, column: str) -> EmbeddingSpec:
        """The embedding column of that name; KeyError names the known ones."""
        for embedding in self.embeddings:
            if embedding.column == column:
                return embedding
        known = ", ".join(embedding.column for embedding in self.embeddings)
        raise KeyError(f"{self.table} has no embedding column {column!r}; it has {known}")


@dataclass(frozen=True)
class QualifiedName:
    """A table's name with its schema. Written `table`, `schema.table`, or quoted as in SQL."""

    schema: str | None
    name: str

    @classmethod
    def parse(cls, text: str) -> "QualifiedName":
        """Read `t`, `s.t`, `"T.x"`, `s."T x"`; unquoted names are taken as they are written.

        Unlike SQL, an unquoted name keeps its capitals: what the YAML says is what is looked up.
        """
        match = re.fullmatch(
            r'(?:(?P<s>"(?:[^"]|"")+"|[^".]+)\.)?(?P<t>"(?:[^"]|"")+"|[^".]+)', text
        )
        if match is None:
            raise ValueError(f'{text!r} is not a table name; write table, schema.table or "Ta.ble"')

        def bare(part: str | None) -> str | None:
            if part is None:
                return None
            return part[1:-1].replace('""', '"') if part.startswith('"') else part

        name = bare(match["t"])
        assert name is not None
        return cls(bare(match["s"]), name)


def dagster_name(name: str) -> str:
    """Encode any name into Dagster's alphabet `[A-Za-z0-9_]`, reversibly.

    Characters outside it become `_x<hex>_`; a literal `_x` that would read as such an escape is
    escaped too. Plain names stay as they are.
    """
    escaped = re.sub(r"_x(?=[0-9a-f]+_)", "_x5f_x", name)
    return re.sub(r"[^A-Za-z0-9_]", lambda match: f"_x{ord(match[0]):x}_", escaped)


def undagster_name(name: str) -> str:
    """The inverse of `dagster_name`."""
    return re.sub(r"_x([0-9a-f]+)_", lambda match: chr(int(match[1], 16)), name)


def short_name(*parts: str, limit: int = 63) -> str:
    """Join names with `_` into one identifier of at most `limit` bytes of UTF-8.

    Postgres truncates longer ones silently (NAMEDATALEN 64), so that two generated names, or a
    generated name and the column it belongs to, may collide. A name that must be cut keeps a
    readable prefix and gets a hash of the whole.
    """
    import hashlib

    whole = "_".join(parts)
    raw = whole.encode()
    if len(raw) <= limit:
        return whole
    digest = hashlib.sha256(raw).hexdigest()[:10]
    suffix = f"_{parts[-1][:12]}_{digest}"
    head = raw[: limit - len(suffix.encode())].decode(errors="ignore")
    return head + suffix


def as_json(value: Any) -> str:
    """Canonical JSON, for comparing keys and for storing them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
