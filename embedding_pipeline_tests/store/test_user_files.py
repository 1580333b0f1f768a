"""The user's own SQL files, applied once and in order."""

from pathlib import Path
from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import migrate
from embedding_pipeline_tests.sessions import value

Connection = psycopg.Connection[Any]


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_files_are_applied_in_the_given_order_and_once(
    connection: Connection, tmp_path: Path
) -> None:
    files = [
        write(tmp_path, "b.sql", "CREATE TABLE notes (id int PRIMARY KEY, body text)"),
        write(tmp_path, "a.sql", "INSERT INTO notes VALUES (1, '100 %');\n-- the end"),
    ]
    reports: list[str] = []

    assert migrate.apply_files(connection, files) == ["b.sql", "a.sql"]
    assert migrate.apply_files(connection, files, report=reports.append) == []

    assert value(connection, "SELECT body FROM notes") == "100 %"
    assert reports == ["b.sql: applied before", "a.sql: applied before"]
    rows = connection.execute(
        "SELECT name, length(sha256) FROM embedding_pipeline.applied_file ORDER BY name"
    )
    assert rows.fetchall() == [("a.sql", 64), ("b.sql", 64)]


def test_a_later_run_applies_only_what_is_new(connection: Connection, tmp_path: Path) -> None:
    first = write(tmp_path, "1.sql", "CREATE TABLE notes (id int PRIMARY KEY)")
    migrate.apply_files(connection, [first])
    second = write(tmp_path, "2.sql", "ALTER TABLE notes ADD body text")

    assert [s.why for s in migrate.plan_files(connection, [first, second])] == [f"apply {second}"]
    assert migrate.apply_files(connection, [first, second]) == ["2.sql"]


def test_a_file_that_fails_leaves_nothing_and_stops_the_rest(
    connection: Connection, tmp_path: Path
) -> None:
    good = write(tmp_path, "1.sql", "CREATE TABLE notes (id int PRIMARY KEY)")
    bad = write(tmp_path, "2.sql", "INSERT INTO notes VALUES (1);\n\nINSERT INTO nots VALUES (2);")
    last = write(tmp_path, "3.sql", "INSERT INTO notes VALUES (3)")

    with pytest.raises(SchemaError) as caught:
        migrate.apply_files(connection, [good, bad, last])

    assert f'{bad}, line 3: relation "nots" does not exist' in str(caught.value)
    assert value(connection, "SELECT count(*) FROM notes") == 0
    bad.write_text("INSERT INTO notes VALUES (2)")
    assert migrate.apply_files(connection, [good, bad, last]) == ["2.sql", "3.sql"]


def test_a_file_changed_after_it_was_applied_is_refused_before_anything_runs(
    connection: Connection, tmp_path: Path
) -> None:
    file = write(tmp_path, "1.sql", "CREATE TABLE notes (id int)")
    migrate.apply_files(connection, [file])
    write(tmp_path, "1.sql", "CREATE TABLE notes (id bigint)")
    new = write(tmp_path, "0.sql", "CREATE TABLE others (id int)")

    with pytest.raises(SchemaError, match=r"1.sql: .* its content has changed since"):
        migrate.apply_files(connection, [new, file])

    assert value(connection, "SELECT to_regclass('others') IS NULL")


@pytest.mark.parametrize(
    "text",
    [
        "CREATE TABLE notes (id int); COMMIT;",
        "BEGIN; CREATE TABLE notes (id int); COMMIT;",
        "CREATE TABLE notes (id int);\n-- done\nrollback",
        "START TRANSACTION; CREATE TABLE notes (id int)",
    ],
)
def test_a_file_with_its_own_transaction_is_refused(
    connection: Connection, tmp_path: Path, text: str
) -> None:
    with pytest.raises(SchemaError, match="Each file runs in one transaction"):
        migrate.apply_files(connection, [write(tmp_path, "1.sql", text)])

    assert value(connection, "SELECT to_regclass('notes') IS NULL")


def test_words_like_commit_in_bodies_and_texts_are_no_transaction(
    connection: Connection, tmp_path: Path
) -> None:
    text = """
    CREATE TABLE notes (
        id int, "commit;" text DEFAULT 'a; COMMIT; b', e text DEFAULT E'\\'; abort'
    );
    CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $body$
    BEGIN
        IF true THEN RETURN 1; END IF;
        RETURN 2;
    END $body$;
    CREATE FUNCTION g() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT 2; END;
    /* ; COMMIT; */ -- ; COMMIT;
    INSERT INTO notes VALUES (f());
    """

    migrate.apply_files(connection, [write(tmp_path, "1.sql", text)])

    assert value(connection, "SELECT count(*) FROM notes") == 1


def test_a_statement_that_no_transaction_may_enclose_is_explained(
    connection: Connection, tmp_path: Path
) -> None:
    file = write(tmp_path, "1.sql", "CREATE TABLE n (id int); CREATE INDEX CONCURRENTLY ON n (id)")

    with pytest.raises(SchemaError, match="execute such a statement by hand"):
        migrate.apply_files(connection, [file])


def test_a_file_that_is_no_text_is_refused(connection: Connection, tmp_path: Path) -> None:
    file = tmp_path / "1.sql"
    file.write_bytes(b"\xff\xfe")

    with pytest.raises(SchemaError, match="cannot be read as UTF-8 text"):
        migrate.apply_files(connection, [file])


def test_an_editors_byte_order_mark_does_no_harm(connection: Connection, tmp_path: Path) -> None:
    file = tmp_path / "1.sql"
    file.write_text("CREATE TABLE notes (id int)", encoding="utf-8-sig")

    assert migrate.apply_files(connection, [file]) == ["1.sql"]
