"""The SQL files: found in a checkout and in a wheel, composed, versioned."""

import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree
from typing import Any

import psycopg
import pytest
from psycopg import sql

from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline.store import migrate, sqlfiles
from embedding_pipeline_tests.sessions import value
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]


def test_composing_quotes_names_and_leaves_out_the_files_own_comment() -> None:
    composed = sqlfiles.compose("index/drop_concurrently", index=sql.Identifier('a"b', "select"))

    assert composed.as_string(None) == 'DROP INDEX CONCURRENTLY "a""b"."select"'
    assert (
        not sqlfiles.compose("extension", schema=sql.Identifier("s"))
        .as_string(None)
        .startswith("--")
    )


def test_a_placeholder_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="index"):
        sqlfiles.compose("index/drop_concurrently")


def test_a_new_version_of_the_projects_tables_is_applied_once(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_docs(connection)
    migrate.migrate(connection, [spec()])
    copytree(sqlfiles.folder(), tmp_path / "sql")
    new = sqlfiles.numbered("project")[-1][0] + 1
    (tmp_path / "sql" / "project" / f"{new:04}_notes.sql").write_text(
        "CREATE TABLE embedding_pipeline.note (id int);\n"
        f"INSERT INTO embedding_pipeline.schema_version (version) VALUES ({new})\n"
    )
    monkeypatch.setattr(sqlfiles, "folder", lambda: tmp_path / "sql")

    statements = migrate.migrate(connection, [spec()])

    assert [s.why for s in statements] == [f"bring the project's tables to version {new}"]
    assert migrate.migrate(connection, [spec()]) == []
    assert value(connection, "SELECT max(version) FROM embedding_pipeline.schema_version") == new


@pytest.mark.skipif(
    not (PROJECT_ROOT / "pyproject.toml").is_file(), reason="not a checkout: nothing to build"
)
def test_a_wheel_carries_the_files(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=PROJECT_ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")

    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".sql")}

    wanted = {
        f"embedding_pipeline/_sql/{file.relative_to(sqlfiles.folder()).as_posix()}"
        for file in sqlfiles.folder().rglob("*.sql")
    }
    assert wanted
    assert packed == wanted
