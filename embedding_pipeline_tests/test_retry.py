"""Quarantined rows: listed, retried from the command line and from the UI, attempts kept."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import dagster as dg
import psycopg
import pytest
from click.testing import CliRunner, Result

from embedding_pipeline.cli import main
from embedding_pipeline.components.retry_job import retry_quarantined
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect_async
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pending import PendingCount, count_by_partition, coverage
from embedding_pipeline.store.quarantine import Refusal, quarantine
from embedding_pipeline.store.retry import parse_keys, quarantined_rows, retry
from embedding_pipeline_tests.project import (
    fresh_settings,
    set_variables,
    use_database,
    write_tables,
)
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]


def bind(connection: Connection, table: TableSpec) -> Column:
    migrate(connection, [table])
    return bind_columns(connection, table)[0]


def refuse(database: str, connection: Connection, column: Column, *keys: tuple[str, ...]) -> None:
    """As a run does when the provider refuses these rows' present texts."""
    from psycopg import sql

    fingerprints: dict[tuple[str, ...], UUID] = {
        tuple(str(part) for part in key): fingerprint
        for key, fingerprint in connection.execute(
            sql.SQL("SELECT {}, {} FROM {}").format(
                column.key_json, column.expected, column.relation
            )
        )
    }

    async def main() -> None:
        async with connect_async(database) as other:
            refusals = [Refusal(key, fingerprints[key], f"400: no {key[0]}") for key in keys]
            await quarantine(other, column, refusals)

    asyncio.run(main())


@pytest.fixture
def column(connection: Connection) -> Column:
    """Eight pending rows: two in each of the partitions a, b, c and NULL."""
    create_docs(connection, 8)
    return bind(connection, spec())


@pytest.fixture
def project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: str, column: Column
) -> Iterator[None]:
    """Commands of this process see the test's database and its table."""
    with fresh_settings():
        use_database(monkeypatch, database)
        write_tables(tmp_path / "defs", column.table)
        set_variables(monkeypatch, EMBEDDING_PIPELINE_DEFS=str(tmp_path / "defs"))
        yield


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["retry", "docs", "embedding_4", *arguments])


def test_a_retried_row_is_pending_again_and_keeps_its_history(
    database: str, connection: Connection, column: Column
) -> None:
    """A row was retried every week for a year, and each time it looked as if refused once."""
    refuse(database, connection, column, ("1",), ("2",))
    first = quarantined_rows(connection, column, keys=[("1",)])[0]
    assert (first.attempts, first.error, first.partition) == (1, "400: no 1", "b")
    assert coverage(connection, column).pending == PendingCount(missing=6, quarantined=2)

    assert retry(connection, column).rows == 2
    assert quarantined_rows(connection, column) == []
    assert coverage(connection, column).pending == PendingCount(missing=8)
    assert sum(count_by_partition(connection, column).values()) == 8
    assert retry(connection, column).rows == 0

    refuse(database, connection, column, ("1",))
    again = quarantined_rows(connection, column)[0]
    assert (again.attempts, again.first_at) == (2, first.first_at)
    assert again.last_at > first.last_at
    assert coverage(connection, column).pending == PendingCount(missing=7, quarantined=1)


def test_only_the_asked_for_rows_are_retried(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, *((str(i),) for i in range(1, 9)))
    assert retry(connection, column, keys=[("007",), ("99",)]).rows == 1
    assert retry(connection, column, keys=[("7",), ("99",)]).unknown == [("7",), ("99",)]
    assert retry(connection, column, partitions=["a"]).rows == 2
    left = {row.key[0] for row in quarantined_rows(connection, column)}
    assert left == {"1", "2", "3", "5", "6"}
    with pytest.raises(PipelineError, match="not a key of this table"):
        retry(connection, column, keys=[("seven",)])


def test_a_row_whose_text_changed_is_not_listed(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, ("1",), ("2",))
    connection.execute("UPDATE docs SET body = 'mended' WHERE id = 1")
    assert [row.key for row in quarantined_rows(connection, column)] == [("2",)]


def test_composite_keys_with_quotes_and_types(database: str, connection: Connection) -> None:
    connection.execute(
        "CREATE TABLE orders (shop text, number uuid, at timestamptz, body text,"
        " PRIMARY KEY (shop, number, at))"
    )
    identifier = "8b5b0f6e-0000-4000-8000-00000000abcd"
    shop = """O'Brien "& sons", [1] %s"""
    connection.execute(
        "INSERT INTO orders VALUES ($1, $2, '2025-01-01 12:00+00', 'text')", [shop, identifier]
    )
    table = spec(
        "orders", id_column=["shop", "number", "at"], partitions={"by": "hash", "buckets": 2}
    )
    column = bind(connection, table)
    refuse(database, connection, column, (shop, identifier, "2025-01-01T12:00:00+00:00"))
    key = quarantined_rows(connection, column)[0].key
    assert key[:2] == (shop, identifier)
    # as somebody else would write the same key
    written = json.dumps([shop, identifier.upper(), "2025-01-01 13:00+01"])
    assert retry(connection, column, keys=parse_keys(written, 3)).rows == 1


@pytest.mark.parametrize(
    ("text", "width", "keys"),
    [
        ("7", 1, [("7",)]),
        ("1.50", 1, [("1.50",)]),
        ("2025-01-01", 1, [("2025-01-01",)]),
        ('"a b"', 1, [("a b",)]),
        ("a b", 1, [("a b",)]),
        ("true", 1, [("true",)]),
        ("[7, 8]", 1, [("7",), ("8",)]),
        ('[["x"], ["y"]]', 1, [("x",), ("y",)]),
        ('["acme", 7]', 2, [("acme", "7")]),
        ('[["acme", 7], ["b", 8]]', 2, [("acme", "7"), ("b", "8")]),
        ("[]", 1, []),
    ],
)
def test_keys_as_people_write_them(text: str, width: int, keys: list[tuple[str, ...]]) -> None:
    assert parse_keys(text, width) == keys


@pytest.mark.parametrize(("text", "width"), [("7", 2), ('["a"]', 2), ('{"id": 7}', 1), ("[[]]", 1)])
def test_what_is_no_key_is_explained(text: str, width: int) -> None:
    with pytest.raises(PipelineError, match="is not a key of this table"):
        parse_keys(text, width)


@pytest.mark.usefixtures("project")
def test_the_command_lists_retries_and_says_what_comes_next(
    database: str, connection: Connection, column: Column
) -> None:
    assert "no row is quarantined" in command("--list").output
    refuse(database, connection, column, ("1",), ("2",), ("3",))

    listed = command("--list", "--json")
    rows = json.loads(listed.output)
    assert [row["key"] for row in rows] == [["1"], ["2"], ["3"]]
    assert rows[0]["error"] == "400: no 1"
    assert rows[0]["attempts"] == 1
    assert rows[0]["since"] == rows[0]["last"]
    assert "400: no 3" in command("--list").output
    assert [row["key"] for row in json.loads(command("--list", "--json", "--ids", "2").output)] == [
        ["2"]
    ]

    done = command("--ids", "[1, 99]")
    assert done.exit_code == 2
    assert "1 rows are pending again" in done.output
    assert "not quarantined: 99" in done.output

    done = command()
    assert (done.exit_code, "2 rows are pending again" in done.output) == (0, True)
    assert "embedding-pipeline backfill docs embedding_4" in done.output
    assert json.loads(command("--json").output) == {"retried": 0, "not_quarantined": []}


@pytest.mark.usefixtures("project")
def test_the_command_teaches() -> None:
    assert "--list" in CliRunner().invoke(main, ["retry", "--help"]).output
    wrong = CliRunner().invoke(main, ["retry", "docs", "embedding_5"])
    assert wrong.exit_code == 2
    assert "embedding_4" in wrong.output
    wrong = command("--ids", '{"id": 7}')
    assert (wrong.exit_code, "JSON list of keys" in wrong.output) == (2, True)


@pytest.mark.usefixtures("project")
def test_the_job_in_the_ui_does_the_same(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, ("1",), ("2",), ("3",))

    def run(**config: Any) -> dg.ExecuteInProcessResult:
        with dg.DagsterInstance.ephemeral() as instance:
            return retry_quarantined.execute_in_process(
                run_config={"ops": {"retry_quarantined_rows": {"config": config}}},
                instance=instance,
                raise_on_error=False,
            )

    assert not run(table="docs", column="nothing").success
    done = run(table="docs", column="embedding_4", ids=["1", "[99]"])
    assert done.output_for_node("retry_quarantined_rows") == 1
    assert run(table="docs", column="embedding_4").output_for_node("retry_quarantined_rows") == 2
    assert coverage(connection, column).pending == PendingCount(missing=8)


def test_the_definitions_have_the_job() -> None:
    from embedding_pipeline.definitions import defs

    assert defs().get_job_def("retry_quarantined").name == "retry_quarantined"


def test_two_columns_of_a_table_are_quarantined_apart(
    database: str, connection: Connection
) -> None:
    create_docs(connection, 4)
    table = spec(embeddings=[embedding(), embedding("embedding_8", 8)])
    migrate(connection, [table])
    four, eight = bind_columns(connection, table)
    refuse(database, connection, four, ("1",))
    refuse(database, connection, eight, ("1",), ("2",))
    assert retry(connection, four).rows == 1
    assert len(quarantined_rows(connection, eight)) == 2


@pytest.mark.usefixtures("project")
def test_a_database_of_an_older_version_is_told_what_to_do(connection: Connection) -> None:
    """After an update every command said `column q.released_at does not exist`."""
    connection.execute("DELETE FROM embedding_pipeline.schema_version WHERE version > 1")
    for arguments in (["retry", "docs", "embedding_4"], ["status", "--table", "docs"]):
        said = CliRunner().invoke(main, arguments)
        assert said.exit_code == 2
        assert "are version 1, this code needs" in said.output
        assert "embedding-pipeline migrate" in said.output
