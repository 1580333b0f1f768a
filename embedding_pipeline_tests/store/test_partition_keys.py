"""Partition keys without a database: encoding, months, buckets."""

from datetime import date, timedelta
from typing import Any

import dagster as dg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.partitions import (
    AFTER_KEY,
    BEFORE_KEY,
    EMPTY_KEY,
    NULL_KEY,
    decode_value,
    encode_value,
    key_from_database,
    month_bounds,
    partition_filter,
    static_keys,
)
from embedding_pipeline_tests.tables import spec

# what a text column may hold: any text without NUL
values = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
# made of what the encoding is about
tricky_values = st.text(st.sampled_from('%,.()[]*"|\\ \n\t\x7f\x85\u2028%2C5null(empty)é'))

SYNTAX = set(',[]*"|')
"""What Dagster's UI or its multi-dimensional keys read as their own syntax."""


@given(values | tricky_values)
@example("")
@example(NULL_KEY)
@example(EMPTY_KEY)
@example(BEFORE_KEY)
@example("...")
@example("a....b")
@example("%2C")
@example(" ")
@example("a\n")
@example("\u3000a")
@example("a\u2028")
def test_every_value_comes_back_from_a_key_that_dagster_takes(value: str | None) -> None:
    key = encode_value(value)
    assert decode_value(key) == value
    assert key
    assert key == key.strip()
    assert not SYNTAX & set(key)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in key), "control characters"
    assert "..." not in key
    # Dagster itself: substrings, and the characters of keys with several dimensions
    dg.StaticPartitionsDefinition([key])
    dg.MultiPartitionsDefinition(
        {"value": dg.StaticPartitionsDefinition([key]), "x": dg.StaticPartitionsDefinition(["y"])}
    )


@given(values | tricky_values, values | tricky_values)
def test_different_values_have_different_keys(one: str | None, other: str | None) -> None:
    assert (encode_value(one) == encode_value(other)) == (one == other)


@given(st.text(st.sampled_from("%2Cc0Ffé(), null)")))
def test_a_key_is_refused_or_stands_for_one_value(key: str) -> None:
    try:
        value = decode_value(key)
    except ValueError:
        return
    assert encode_value(value) == key


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (None, "(null)"),
        ("", "(empty)"),
        ("acme", "acme"),
        ("panadería del sur", "panadería del sur"),
        ("O'Brien & Sons", "O'Brien & Sons"),
        ("a,b", "a%2Cb"),
        ("100%", "100%25"),
        ("(null)", "%28null)"),
        (" a ", "%20a%20"),
        ("a...b", "a%2E%2E%2Eb"),
        ("a..b", "a..b"),
        ("tab\there", "tab%09here"),
        ("\u3000", "%E3%80%80"),
        ("7d0c9d5e-8f31-4c5e-9a69-9a3f2b0f2a11", "7d0c9d5e-8f31-4c5e-9a69-9a3f2b0f2a11"),
    ],
)
def test_what_values_become(value: str | None, key: str) -> None:
    assert encode_value(value) == key
    assert decode_value(key) == value


@pytest.mark.parametrize(
    "key", ["", "a,b", "%", "%2", "%zz", "%2c", "%41", "%FF", " a", "(a", "\0"]
)
def test_a_key_that_no_value_has_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is not a partition key of this table"):
        decode_value(key)


class TestMonths:
    """Keys of `by: month`."""

    @given(st.dates())
    def test_a_month_holds_its_days_and_no_others(self, day: date) -> None:
        low, high = month_bounds(f"{day:%Y-%m}".rjust(7, "0"))
        assert low is not None
        assert high is not None
        first = date.fromisoformat(low)
        assert first == day.replace(day=1)
        if high == "10000-01-01":
            assert (first.year, first.month) == (9999, 12)
            return
        last = date.fromisoformat(high) - timedelta(days=1)
        assert first <= day <= last
        assert (last.year, last.month) == (day.year, day.month)

    def test_the_open_ends_meet_the_months(self) -> None:
        assert month_bounds(BEFORE_KEY) == (None, month_bounds("0001-01")[0])
        assert month_bounds(AFTER_KEY) == (month_bounds("9999-12")[1], None)

    @pytest.mark.parametrize(
        "key",
        ["2025-13", "2025-00", "0000-01", "2025-3", "25-03", "2025-03-01", "2025/03", "", "(null)",
         "2025-03 ", "2025-03\n", "٢٠٢٥-٠٣", "-2025-03"],
    )  # fmt: skip
    def test_what_is_no_month_is_refused(self, key: str) -> None:
        with pytest.raises(ValueError, match=r"write 2025-03"):
            month_bounds(key)


def condition(table: TableSpec, column_type: str, key: str, **options: Any) -> tuple[str, ...]:
    """A partition's condition as SQL, and its parameters."""
    found = partition_filter(table, column_type, key, **options)
    return found.condition.as_string(None), *found.parameters


class TestFilters:
    """The condition for one partition's rows."""

    def test_a_value(self) -> None:
        assert condition(spec(), "text", "a%2Cb") == ('"tenant" = $1::text::text', "a,b")
        assert condition(spec(), "uuid", "x", first_parameter=3) == (
            '"tenant" = $3::text::uuid',
            "x",
        )

    def test_the_null_partition_uses_the_index(self) -> None:
        """`IS NOT DISTINCT FROM NULL` would not."""
        assert condition(spec(), "text", NULL_KEY) == ('"tenant" IS NULL',)
        by_month = spec(partitions={"by": "month", "column": "made"})
        assert condition(by_month, "date", NULL_KEY) == ('"made" IS NULL',)

    def test_a_bucket(self) -> None:
        table = spec(partitions={"by": "hash", "buckets": 12}, id_column=["a", "B b"])
        assert condition(table, "bigint", "11", first_parameter=2) == (
            '((hash_record_extended(ROW("a", "B b"), 0) & 9223372036854775807) % 12) = '
            "$2::text::bigint",
            "11",
        )

    @pytest.mark.parametrize("key", ["12", "-1", "00", "01", "1.0", "", " 1", "¹", "١", NULL_KEY])
    def test_what_is_no_bucket_is_refused(self, key: str) -> None:
        table = spec(partitions={"by": "hash", "buckets": 12})
        with pytest.raises(ValueError, match=r"is not a partition of docs; they are 0 to 11"):
            condition(table, "bigint", key)

    def test_a_month(self) -> None:
        table = spec(partitions={"by": "month", "column": "made"})
        assert condition(table, "date", "2024-12") == (
            '"made" >= $1::text::date AND "made" < $2::text::date',
            "2024-12-01",
            "2025-01-01",
        )
        assert condition(table, "timestamp with time zone", "2024-12", first_parameter=4) == (
            '"made" >= $4::text::timestamp with time zone '
            'AND "made" < $5::text::timestamp with time zone',
            "2024-12-01 00:00:00+00",
            "2025-01-01 00:00:00+00",
        )

    def test_a_month_that_is_open_at_one_end(self) -> None:
        table = spec(partitions={"by": "month", "column": "made"})
        assert condition(table, "date", BEFORE_KEY) == ('"made" < $1::text::date', "0001-01-01")
        assert condition(table, "date", AFTER_KEY) == ('"made" >= $1::text::date', "10000-01-01")


def test_buckets_are_known_without_looking_at_the_data() -> None:
    assert static_keys(spec(partitions={"by": "hash", "buckets": 3})) == ["0", "1", "2"]
    assert static_keys(spec()) is None
    assert static_keys(spec(partitions={"by": "month", "column": "made"})) is None


def test_what_the_database_gives_becomes_a_key() -> None:
    by_month = spec(partitions={"by": "month", "column": "made"})
    assert key_from_database(spec(), "a,b") == "a%2Cb"
    assert key_from_database(spec(), None) == NULL_KEY
    assert key_from_database(spec(), "") == EMPTY_KEY
    assert key_from_database(by_month, "2025-03") == "2025-03"
    assert key_from_database(by_month, None) == NULL_KEY
