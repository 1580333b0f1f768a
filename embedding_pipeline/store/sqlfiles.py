"""The SQL files in `sql/`: every statement that defines or changes schema, readable as SQL.

A file may hold `{placeholders}`; they are filled through `psycopg.sql`, so a name is quoted and a
value is a literal whatever it contains.
"""

import re
from functools import cache
from pathlib import Path

from psycopg import sql

_PACKAGE = Path(__file__).resolve().parent.parent
_HEADER = re.compile(r"\A(?:--[^\n]*\n)+")


@cache
def folder() -> Path:
    """`sql/` beside the package in a checkout, `_sql` inside it in an installed wheel."""
    for candidate in (_PACKAGE / "_sql", _PACKAGE.parent / "sql"):
        if (candidate / "project").is_dir():
            return candidate
    raise FileNotFoundError(
        f"the SQL files are missing: neither {_PACKAGE / '_sql'} nor {_PACKAGE.parent / 'sql'} "
        "exists; install the package again"
    )


@cache
def read(name: str) -> str:
    """The text of `sql/<name>.sql`."""
    return (folder() / f"{name}.sql").read_text(encoding="utf-8").strip()


def compose(name: str, /, **values: sql.Composable) -> sql.Composed:
    """`sql/<name>.sql` with its placeholders filled; KeyError for one that is not given.

    The comment at the file's head is for its reader and is left out.
    """
    return sql.SQL(_HEADER.sub("", read(name))).format(**values)


def query(name: str) -> bytes:
    """`sql/<name>.sql` as it stands, for queries whose parameters are bound (`$1`)."""
    return read(name).encode()


def numbered(name: str) -> list[tuple[int, str]]:
    """The files `sql/<name>/0001_….sql`, … as (number, name without `.sql`), in order."""
    files = sorted((folder() / name).glob("[0-9][0-9][0-9][0-9]_*.sql"))
    return [(int(file.name[:4]), f"{name}/{file.stem}") for file in files]
