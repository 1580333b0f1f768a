"""Partition keys: which rows each stands for, and how any value becomes a key and back.

Every row lies in exactly one partition. The pending index holds the raw column (or the hash
bucket), because `date_trunc` on timestamptz and text casts of dates are not immutable; keys are
made from it here.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from psycopg import sql

from embedding_pipeline.spec import ColumnPartitions, HashPartitions, MonthPartitions, TableSpec

NULL_KEY = "(null)"
EMPTY_KEY = "(empty)"
BEFORE_KEY = "(before-0001)"
AFTER_KEY = "(after-9999)"
_UNSAFE = re.compile(r'[%,\x00-\x1f\x7f-\x9f\[\]*"|\\]|^\s|\s\Z|^\(|\.{3,}')
_MONTH = re.compile(r"([0-9]{4})-([0-9]{2})")


def encode_value(value: str | None) -> str:
    """A column's value as a partition key that Dagster and its UI take, reversibly.

    Dagster refuses control characters and `...` in keys, and its UI reads commas, brackets, `*`
    and quotes as its own syntax; those become `%XX`, and NULL and the empty string get names
    that no value can have.
    """
    if value is None:
        return NULL_KEY
    if value == "":
        return EMPTY_KEY
    return _UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), value)


def decode_value(key: str) -> str | None:
    """The inverse of `encode_value`; ValueError for a key that it cannot have made."""
    if key == NULL_KEY:
        return None
    if key == EMPTY_KEY:
        return ""
    try:
        value = unquote(key, errors="strict")
    except UnicodeDecodeError:
        value = None
    if value is None or encode_value(value) != key:
        raise ValueError(f"{key!r} is not a partition key of this table")
    return value


@dataclass(frozen=True)
class PartitionFilter:
    """A condition on the partition's index column, with its parameters (values as text)."""

    condition: sql.Composable
    parameters: tuple[str, ...]


def index_expression(table: TableSpec) -> sql.Composable:
    """The leading column of the pending index: the raw partition column or the hash bucket."""
    partitions = table.partitions
    if isinstance(partitions, HashPartitions):
        # the sign bit is masked off rather than abs()'d: abs(-2^63) overflows
        return sql.SQL(
            "((hash_record_extended(ROW({keys}), 0) & 9223372036854775807) % {buckets})"
        ).format(
            keys=sql.SQL(", ").join(map(sql.Identifier, table.key_columns)),
            buckets=sql.Literal(partitions.buckets),
        )
    return sql.Identifier(partitions.column)


def partition_filter(
    table: TableSpec, column_type: str, key: str, first_parameter: int = 1
) -> PartitionFilter:
    """The rows of one partition, in a form that the pending index serves.

    `column_type` is the partition column's type as the catalogue writes it (unused for hash);
    parameters are numbered from `$first_parameter` (the connections use raw cursors).
    The casts are on the parameters, never on the column: a cast there would lose the index.
    ValueError for a key that this table's partitioning does not have.
    """
    partitions = table.partitions
    column = index_expression(table)
    if isinstance(partitions, HashPartitions):
        if key not in map(str, range(partitions.buckets)):
            raise ValueError(
                f"{key!r} is not a partition of {table.table}; "
                f"they are 0 to {partitions.buckets - 1}"
            )
        return PartitionFilter(
            sql.SQL("{} = {}::text::bigint").format(column, _parameter(first_parameter)),
            (key,),
        )
    if key == NULL_KEY:
        return PartitionFilter(sql.SQL("{} IS NULL").format(column), ())
    cast = sql.SQL(column_type)  # from the catalogue's format_type, which quotes what needs it
    if isinstance(partitions, ColumnPartitions):
        value = decode_value(key)
        assert value is not None
        return PartitionFilter(
            sql.SQL("{} = {}::text::{}").format(column, _parameter(first_parameter), cast),
            (value,),
        )
    low, high = month_bounds(key)
    conditions: list[sql.Composable] = []
    values: list[str] = []
    for operator, bound in ((">=", low), ("<", high)):
        if bound is not None:
            parameter = _parameter(first_parameter + len(values))
            conditions.append(
                sql.SQL("{} {} {}::text::{}").format(column, sql.SQL(operator), parameter, cast)
            )
            values.append(
                bound if column_type != "timestamp with time zone" else f"{bound} 00:00:00+00"
            )
    return PartitionFilter(sql.SQL(" AND ").join(conditions), tuple(values))


def _parameter(number: int) -> sql.SQL:
    return sql.SQL(f"${number}")  # a number, not user text


def month_bounds(key: str) -> tuple[str | None, str | None]:
    """First day of the month and of the next; None where a partition is open at that end."""
    if key == BEFORE_KEY:
        return None, "0001-01-01"
    if key == AFTER_KEY:
        return "10000-01-01", None
    match = _MONTH.fullmatch(key)
    if match is None or not 1 <= int(match[2]) <= 12 or int(match[1]) < 1:
        raise ValueError(f"{key!r} is not a partition key of a table by month; write 2025-03")
    year, month = int(match[1]), int(match[2])
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return f"{year:04}-{month:02}-01", f"{following[0]:04}-{following[1]:02}-01"


def key_expression(table: TableSpec, column_type: str) -> sql.Composable:
    """SQL text that names the partition of a row: raw value, bucket number, or month key.

    For `by: column` the caller still has to `encode_value` it. Only for output columns and
    GROUP BY, where nothing needs to be immutable; the time zone must be UTC.
    """
    partitions = table.partitions
    column = index_expression(table)
    if not isinstance(partitions, MonthPartitions):
        return sql.SQL("({})::text").format(column)
    moment = (
        sql.SQL("({} AT TIME ZONE 'UTC')").format(column)
        if column_type == "timestamp with time zone"
        else sql.SQL("({})::timestamp").format(column)
    )
    return sql.SQL(
        "CASE WHEN {moment} < '0001-01-01' THEN {before}"
        " WHEN {moment} >= '10000-01-01' THEN {after}"
        " ELSE to_char({moment}, 'YYYY-MM') END"
    ).format(moment=moment, before=sql.Literal(BEFORE_KEY), after=sql.Literal(AFTER_KEY))


def key_from_database(table: TableSpec, value: str | None) -> str:
    """A partition key from what `key_expression` gave."""
    if isinstance(table.partitions, ColumnPartitions):
        return encode_value(value)
    return NULL_KEY if value is None else value


def static_keys(table: TableSpec) -> list[str] | None:
    """All keys where they are known without looking at the data, else None."""
    if isinstance(table.partitions, HashPartitions):
        return [str(bucket) for bucket in range(table.partitions.buckets)]
    return None
