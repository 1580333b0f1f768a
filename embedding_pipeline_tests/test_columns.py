"""Choosing tables and columns by name."""

from pathlib import Path

import pytest

from embedding_pipeline.columns import select
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline_tests.tables import embedding, spec

FILES = [
    TableFile(spec(table, embeddings=[embedding(column) for column in columns]), Path(table))
    for table, columns in {"docs": ["small", "large"], "notes": ["small", "other"]}.items()
]


def chosen(*tables: str, columns: list[str] | None = None) -> list[str]:
    return [
        f"{file.spec.table}.{each.column}"
        for file, embeddings in select(FILES, tables, columns or [])
        for each in embeddings
    ]


def test_everything_where_nothing_is_asked_for() -> None:
    assert chosen() == ["docs.small", "docs.large", "notes.small", "notes.other"]


def test_a_table() -> None:
    assert chosen("notes") == ["notes.small", "notes.other"]
    assert chosen("notes", "docs", "notes") == chosen()


def test_a_column_of_every_table_that_has_it() -> None:
    assert chosen(columns=["small"]) == ["docs.small", "notes.small"]
    assert chosen(columns=["large"]) == ["docs.large"]
    assert chosen(columns=["other", "large"]) == ["docs.large", "notes.other"]


def test_a_column_of_one_table() -> None:
    assert chosen("notes", columns=["small"]) == ["notes.small"]


@pytest.mark.parametrize(
    ("tables", "columns", "message"),
    [
        (["nots"], [], "there is no table 'nots'; the YAML declares: docs, notes"),
        (["docs", "nots"], [], "there is no table 'nots'; the YAML declares: docs, notes"),
        (
            [],
            ["small", "lrge"],
            "there is no column 'lrge' in docs, notes; the YAML declares: small, large, other",
        ),
        (
            ["notes"],
            ["large"],
            "there is no column 'large' in notes; the YAML declares: small, other",
        ),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_those_that_do(
    tables: list[str], columns: list[str], message: str
) -> None:
    """Of two columns asked for, a misspelt one was left out without a word."""
    with pytest.raises(PipelineError) as caught:
        select(FILES, tables, columns)
    assert str(caught.value) == message


def test_without_any_table_the_way_to_add_one_is_named() -> None:
    with pytest.raises(PipelineError, match=r"add a folder with a defs\.yaml"):
        select([], [], [])
