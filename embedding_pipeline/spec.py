"""What a table's YAML says, typed and checked: tables, embedding columns, recipes, partitions.

Nothing here knows Dagster or the database. `spec_files.py` reads these from `defs.yaml`.
"""

import hashlib
import json
import keyword
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from embedding_pipeline.clock import time_of_day, time_zone

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


MAX_NAME_BYTES = 63
"""Postgres cuts longer identifiers silently (NAMEDATALEN is 64)."""


def mistake(message: str, *at: str | int) -> PydanticCustomError:
    """A validation error of a whole model that says which key inside it is wrong (`at`)."""
    return PydanticCustomError("mistake", "{message}", {"message": message, "at": at})


def _no_bool(value: Any) -> Any:
    # YAML reads `yes` and `on` as true, and pydantic would read that as 1
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "must be a number")
    return value


def _storable(value: str) -> str:
    if "\x00" in value:
        raise ValueError("has a NUL character, which Postgres cannot store")
    return value


def _identifier(value: str) -> str:
    if len(value.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"is longer than {MAX_NAME_BYTES} bytes, where Postgres cuts names: {value[:20]}…"
        )
    return value


def _expression(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank: a column's name, or an SQL expression over the row")
    return value


def _owner(value: str) -> str:
    # Dagster's own rule; it would name the asset instead of the file
    if not re.fullmatch(r"team:.+|[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}", value):
        raise ValueError("must be an email address, or a team written team:name")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Identifier = Annotated[
    str, Field(min_length=1), AfterValidator(_storable), AfterValidator(_identifier)
]
Expression = Annotated[str, AfterValidator(_storable), AfterValidator(_expression)]
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Owner = Annotated[str, AfterValidator(_owner)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HashPartitions(_Strict):
    """A fixed number of buckets by a hash of the key; for tables without a natural partition."""

    by: Literal["hash"]
    buckets: Whole = Field(8, ge=1, le=1024, description="How many.")


class ColumnPartitions(_Strict):
    """One partition for each value of a column, following the data."""

    by: Literal["column"]
    column: Identifier = Field(description="The column whose values are the partitions.")


class MonthPartitions(_Strict):
    """One partition for each month (UTC) of a date or timestamp column, following the data."""

    by: Literal["month"]
    column: Identifier = Field(description="The date or timestamp column.")


def _shorthand(value: Any) -> Any:
    return {"enabled": value} if isinstance(value, bool) else value


class NightlySpec(_Strict):
    """When the nightly schedule comes to a table."""

    enabled: bool = Field(True, description="false: the nightly schedule leaves the table out.")
    at: Annotated[str, BeforeValidator(time_of_day)] | None = Field(
        None, description='A time of day, such as "03:30"; left out: NIGHTLY_AT.'
    )
    timezone: Annotated[str, AfterValidator(time_zone)] | None = Field(
        None, description="An IANA name, such as Europe/Madrid; left out: NIGHTLY_TIMEZONE."
    )


Nightly = Annotated[
    NightlySpec, BeforeValidator(_shorthand, json_schema_input_type=bool | NightlySpec)
]
Partitions = Annotated[
    HashPartitions | ColumnPartitions | MonthPartitions, Field(discriminator="by")
]


class EmbeddingSpec(_Strict):
    """One embedding column: which model fills it and what is expected of it."""

    column: Identifier = Field(description="The vector column's name.")
    dimensions: Whole = Field(ge=1, description="The vectors' width.")
    provider: Label = Field(
        description="tei, openai, local, or a name that providers.yaml declares."
    )
    model: Label = Field(
        description="The model's name, as its provider knows it; "
        "such as sentence-transformers/all-MiniLM-L6-v2."
    )
    baseline: str | None = Field(
        None, description="Another column of this table that this one is compared with."
    )
    prefix: str = Field("", description='Put before every text, such as "passage: ".')
    overlong: Literal["truncate", "quarantine"] = Field(
        "truncate", description="What becomes of a text longer than the model reads."
    )
    reuse: bool = Field(
        False, description="Copy vectors of equal texts stored already; costs an index."
    )
    mrr_floor: Number = Field(0.3, ge=0, le=1, description="Least MRR@5 on the golden set.")
    baseline_ratio: Number = Field(
        0.9, gt=0, le=2, description="Least MRR@5 as a share of the baseline's."
    )
    recall_floor: Number = Field(
        0.9, ge=0, le=1, description="Least share of the exact neighbours that the index finds."
    )
    max_pending_minutes: Number = Field(
        60, gt=0, description="Rows that have been pending for longer are an error."
    )
    max_quarantined_share: Number = Field(
        0.01, ge=0, le=1, description="A larger share of refused rows stops the run."
    )
    max_cost: Number | None = Field(
        None, gt=0, description="US dollars; a run stops before it would pass them."
    )
    batch_size: Whole = Field(64, ge=1, le=2048, description="Texts in one request.")
    concurrency: Whole = Field(8, ge=1, le=256, description="Requests in flight at once.")

    @field_validator("dimensions")
    @classmethod
    def _can_be_indexed(cls, value: int) -> int:
        if value > HNSW_MAX_DIMENSIONS:
            raise ValueError(
                f"must be at most {HNSW_MAX_DIMENSIONS}, pgvector's limit for an HNSW index; "
                "ask the model for fewer, or take another model"
            )
        return value

    @model_validator(mode="after")
    def _width_fits_model(self) -> Self:
        known = KNOWN_WIDTHS.get(self.model)
        if known and not known[0] <= self.dimensions <= known[1]:
            gives = str(known[1]) if known[0] == known[1] else f"{known[0]} to {known[1]}"
            remedy = min(known[1], HNSW_MAX_DIMENSIONS)
            raise mistake(
                f"{self.model} gives {gives} dimensions, not {self.dimensions}; "
                f"write dimensions: {remedy}, or name another model",
                "dimensions",
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


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


class TableSpec(_Strict):
    """One source table with its embedding columns."""

    table: str = Field(description="The source table: name, or schema.name.")
    id_column: Annotated[
        Annotated[Identifier, Tag("one")]
        | Annotated[Annotated[list[Identifier], Field(min_length=1)], Tag("many")],
        Discriminator(_one_or_many),
    ] = Field("id", description="The primary key's column; a list for a composite key.")
    text: Expression = Field(description="A column, or an SQL expression over the row.")
    eligible: Expression | None = Field(
        None, description="SQL condition; rows that fail it have no vector."
    )
    tenant_column: Identifier | None = Field(None, description="The column that separates tenants.")
    partitions: Partitions = Field(
        HashPartitions(by="hash"),
        description="{by: hash, buckets: 8}, {by: column, column: …} or {by: month, column: …}.",
    )
    embeddings: list[EmbeddingSpec] = Field(
        min_length=1, description="The embedding columns, each with its model."
    )
    golden_set: Label | None = Field(
        None, description="File beside this one: queries with the keys that they should find."
    )
    owners: list[Owner] = Field([], description="Email addresses, or teams written team:name.")
    description: str | None = Field(None, description="What the rows are.")
    rows_per_run: Whole = Field(100_000, ge=1, description="Most rows that one run embeds.")
    nightly: Nightly = Field(
        NightlySpec(),
        description='{at: "03:30", timezone: Europe/Madrid}, or false for no nightly run.',
    )

    @field_validator("table")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        QualifiedName.parse(value)
        return value

    @field_validator("id_column")
    @classmethod
    def _names_differ(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and len(set(value)) != len(value):
            raise ValueError("names a column twice")
        return value

    @model_validator(mode="after")
    def _columns_fit_together(self) -> Self:
        names = [embedding.column for embedding in self.embeddings]
        taken: dict[str, str] = dict.fromkeys(self.key_columns, "the key")
        if self.tenant_column:
            taken.setdefault(self.tenant_column, "the tenant column")
        if not isinstance(self.partitions, HashPartitions):
            taken.setdefault(self.partitions.column, "the partition column")
        assets = {"retrieval_quality": "the table's evaluation"}
        for number, embedding in enumerate(self.embeddings):
            name, at = embedding.column, ("embeddings", number, "column")
            if name in names[:number]:
                raise mistake(
                    f"{name!r} is named twice; a column holds one model's vectors only, so give "
                    "each its own column",
                    *at,
                )
            for column, what in (
                (name, f"the vectors of {name!r}"),
                (embedding.fingerprint_column, f"the fingerprints of {name!r}"),
            ):
                if column in taken:
                    raise mistake(
                        f"column {column!r} would hold {what}, but is already {taken[column]}; "
                        "name the embedding column otherwise",
                        *at,
                    )
                taken[column] = what
            asset = dagster_name(name)
            for key, what in (
                (asset, f"the column {name!r}"),
                (f"{asset}_index", f"the index of {name!r}"),
            ):
                if key in assets:
                    raise mistake(
                        f"Dagster's asset {key!r} would be both {assets[key]} and {what}; "
                        "name the embedding column otherwise",
                        *at,
                    )
                assets[key] = what
        for number, embedding in enumerate(self.embeddings):
            at = ("embeddings", number, "baseline")
            if embedding.baseline is None:
                continue
            if embedding.baseline == embedding.column:
                others = [name for name in names if name != embedding.column]
                raise mistake(
                    f"{embedding.column} cannot be compared with itself; "
                    f"name another column ({', '.join(others) or 'there is none'}), "
                    "or leave the key out",
                    *at,
                )
            if embedding.baseline not in names:
                raise mistake(
                    f"{embedding.baseline!r} is not an embedding column of this table; "
                    f"known: {', '.join(names)}",
                    *at,
                )
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

        Unlike SQL, an unquoted name keeps its capitals and inner spaces: what the YAML says is
        what is looked up. ValueError for what is no table name, or too long for Postgres.
        """
        part = r'"(?:[^"]|"")+"|[^".\s](?:[^".]*[^".\s])?'
        match = re.fullmatch(rf"(?:(?P<schema>{part})\.)?(?P<name>{part})", text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a table name; write table, schema.table or, for a name with "
                """dots, quotes or outer spaces, '"Ta.ble"'"""
            )

        def bare(part: str) -> str:
            name = part[1:-1].replace('""', '"') if part.startswith('"') else part
            return _identifier(_storable(name))

        return cls(bare(match["schema"]) if match["schema"] else None, bare(match["name"]))

    def __str__(self) -> str:
        """The shortest text that `parse` reads as this name."""
        return ".".join(
            part
            if re.fullmatch(r'[^".\s](?:[^".]*[^".\s])?', part)
            else '"' + part.replace('"', '""') + '"'
            for part in (self.schema, self.name)
            if part is not None
        )


RESERVED_WORDS = frozenset(keyword.kwlist) | {
    "arg_dict", "bool", "conf", "config", "context", "dict", "float", "input", "input_arg_dict",
    "int", "meta", "output", "output_arg_dict", "str", "type",
}  # fmt: skip
"""Names that Dagster refuses for the inputs of steps, which are made from tables' names."""


def dagster_name(name: str) -> str:
    """Encode any name into Dagster's alphabet `[A-Za-z0-9_]`, reversibly.

    Characters outside it become `_x<hex>_`, and so does the first one of a reserved word; a
    literal `_x` that would read as the start of such an escape is escaped too. Plain names stay
    as they are.
    """
    if name in RESERVED_WORDS:
        return f"_x{ord(name[0]):x}_{name[1:]}"
    # after encoding, every character outside the alphabet begins with `_` and so ends an escape
    escaped = re.sub(r"_x(?=[0-9a-f]+(?:_|[^A-Za-z0-9]))", "_x5f_x", name)
    return re.sub(r"[^A-Za-z0-9_]", lambda match: f"_x{ord(match[0]):x}_", escaped)


def undagster_name(name: str) -> str:
    """The inverse of `dagster_name`."""
    return re.sub(r"_x([0-9a-f]+)_", lambda match: chr(int(match[1], 16)), name)


def short_name(*parts: str) -> str:
    """Join names with `_` into one identifier of at most 63 bytes of UTF-8.

    Postgres cuts longer ones silently, so that two generated names, or a generated name and the
    column it belongs to, might collide. A name that must be cut keeps a readable prefix and its
    last part, and gets a hash of the whole. Different joined names give different short ones;
    that `a`, `b_c` and `a_b`, `c` join to the same is for the caller to refuse.
    """
    whole = "_".join(parts)
    raw = whole.encode()
    if len(raw) <= MAX_NAME_BYTES:
        return whole
    digest = hashlib.sha256(raw).hexdigest()[:10]
    last = parts[-1].encode()[:12].decode(errors="ignore")
    suffix = f"_{last}_{digest}"
    head = raw[: MAX_NAME_BYTES - len(suffix.encode())].decode(errors="ignore")
    return head + suffix


def as_json(value: Any) -> str:
    """Canonical JSON, for comparing keys and for storing them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
