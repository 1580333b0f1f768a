"""One embedding column of one real table: the pending predicate and the names made from it.

Pending is a predicate over the row itself, so it cannot drift from the data (DESIGN.md,
"Pending is a predicate, not a ledger"). Every literal in it is composed here and nowhere else,
because the planner uses the pending index only for the very expression that the index holds.
"""

from dataclasses import dataclass, field
from functools import cached_property

from psycopg import sql

from embedding_pipeline.spec import EmbeddingSpec, TableSpec, short_name
from embedding_pipeline.store import partitions

BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)  # written out: to ask every character takes 50 ms of each process's start
"""Every character that `str.isspace` knows: a text of these alone is blank, in SQL as in Python."""

BLANKS_SQL = sql.SQL("E'" + "".join(f"\\u{ord(char):04x}" for char in BLANKS) + "'")
"""`BLANKS` in ASCII: a printed script must survive an editor that mends line endings."""


@dataclass(frozen=True)
class ColumnFacts:
    """What the catalogue says of one column of a source table."""

    name: str
    type: str
    """As `format_type` writes it, schema-qualified and quoted as needed."""
    type_name: str
    type_schema: str
    modifier: int
    """`atttypmod`: for pgvector's types the number of dimensions, -1 where none is declared."""
    not_null: bool
    generated: bool


@dataclass(frozen=True)
class Trigger:
    """A trigger of the user's that fires when a row is updated."""

    name: str
    definition: str
    function: str
    source: str
    arguments: str
    row: bool
    before: bool
    columns: tuple[str, ...]
    """`UPDATE OF …`: fires only for these; empty for any."""


@dataclass(frozen=True)
class TableFacts:
    """What the catalogue says of a source table."""

    schema: str
    name: str
    oid: int
    columns: dict[str, str]
    """Column name → type as `format_type` writes it (schema-qualified, quoted as needed)."""
    vector_schema: str
    """The schema that holds pgvector's types: `public`, or `extensions` at some hosts."""
    is_partitioned: bool = False
    attributes: dict[str, ColumnFacts] = field(default_factory=dict)
    update_triggers: tuple[Trigger, ...] = ()
    owned: bool = True
    """Whether our role may change the table's definition."""
    role: str = ""
    """The role that asked."""


@dataclass(frozen=True)
class Column:
    """An embedding column bound to the table that the catalogue describes."""

    table: TableSpec
    embedding: EmbeddingSpec
    facts: TableFacts

    def __str__(self) -> str:
        return f"{self.table.table}.{self.embedding.column}"

    @property
    def relation(self) -> sql.Composable:
        """The source table, always with its schema."""
        return sql.Identifier(self.facts.schema, self.facts.name)

    @property
    def vector(self) -> sql.Identifier:
        return sql.Identifier(self.embedding.column)

    @property
    def fingerprint(self) -> sql.Identifier:
        return sql.Identifier(self.embedding.fingerprint_column)

    @property
    def keys(self) -> sql.Composable:
        """The key columns, comma-separated."""
        return sql.SQL(", ").join(map(sql.Identifier, self.table.key_columns))

    @property
    def key_types(self) -> list[str]:
        return [self.facts.columns[name] for name in self.table.key_columns]

    @property
    def key_json(self) -> sql.Composable:
        """The key as a JSON array: how quarantine, golden sets and messages name a row."""
        return sql.SQL("jsonb_build_array({})").format(self.keys)

    @property
    def vector_type(self) -> sql.Composable:
        """`vector(n)` with its schema, which need not be on the search path."""
        return sql.SQL("{}({})").format(
            sql.Identifier(self.facts.vector_schema, "vector"),
            sql.Literal(self.embedding.dimensions),
        )

    @property
    def partition_type(self) -> str:
        column = getattr(self.table.partitions, "column", None)
        return self.facts.columns[column] if column else "bigint"

    @cached_property
    def text(self) -> sql.Composable:
        """The text to embed, as SQL over the row."""
        return _column_or_expression(self.table.text, self.facts)

    @cached_property
    def eligible(self) -> sql.Composable:
        """True for a row that should have a vector; NULL counts as false."""
        return self._with_condition(
            # the whole text is copied to be stripped (3 to 8 µs a kB): only of one that begins
            # with a blank. "C", for a user's collation may not take part in a search
            sql.SQL(
                '(strpos({blanks}, left(({text})::text, 1) COLLATE "C") = 0 OR {not_blank})'
            ).format(blanks=BLANKS_SQL, text=self.text, not_blank=self._not_blank)
        )

    @cached_property
    def expected(self) -> sql.Composable:
        """The fingerprint that the row's text calls for now; NULL for an ineligible row.

        The recipe is a literal: a parameter loses the index under a generic plan.
        """
        return self._fingerprint_if(self.eligible)

    @cached_property
    def definition(self) -> sql.Composable:
        """What `expected` means, in fewer words: the registry keeps and compares this."""
        return self._fingerprint_if(self._with_condition(self._not_blank))

    @property
    def _not_blank(self) -> sql.Composable:
        return sql.SQL("btrim(({text})::text, {blanks}) <> ''").format(
            text=self.text, blanks=BLANKS_SQL
        )

    def _with_condition(self, not_blank: sql.Composable) -> sql.Composable:
        if self.table.eligible is None:
            return not_blank
        return sql.SQL("{} AND ({})").format(
            not_blank, _column_or_expression(self.table.eligible, self.facts)
        )

    def _fingerprint_if(self, eligible: sql.Composable) -> sql.Composable:
        return sql.SQL(
            "CASE WHEN {eligible} THEN md5({recipe} || E'\\n' || ({text})::text)::uuid END"
        ).format(eligible=eligible, recipe=sql.Literal(self.embedding.recipe), text=self.text)

    @cached_property
    def pending(self) -> sql.Composable:
        """True for a row whose stored vector is not the one that its text calls for.

        `vector IS NULL` is compared with the fingerprint and not with `expected`: the two are the
        same where it matters, and each row that is written would pay for one more md5.
        """
        return sql.SQL(
            "({fingerprint} IS DISTINCT FROM {expected}"
            " OR ({vector} IS NULL) <> ({fingerprint} IS NULL))"
        ).format(fingerprint=self.fingerprint, expected=self.expected, vector=self.vector)

    @property
    def partition_index_expression(self) -> sql.Composable:
        return partitions.index_expression(self.table)

    @property
    def pending_index(self) -> str:
        """Name of the partial index that is the work queue."""
        return short_name(self.facts.name, self.embedding.column, "pending")

    @property
    def hnsw_index(self) -> str:
        """Name of the HNSW index."""
        return short_name(self.facts.name, self.embedding.column, "hnsw")

    def partition(self, key: str, first_parameter: int = 1) -> partitions.PartitionFilter:
        """The condition for one partition's rows."""
        return partitions.partition_filter(self.table, self.partition_type, key, first_parameter)


def _column_or_expression(text: str, facts: TableFacts) -> sql.Composable:
    """A column's own name is taken literally (capitals, spaces, reserved words); else SQL."""
    if text in facts.columns:
        return sql.Identifier(text)
    return sql.SQL(f"({text})")  # the table owner's own SQL
