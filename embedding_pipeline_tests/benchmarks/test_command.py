"""`python -m benchmarks` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.parts import PARTS
from embedding_pipeline.settings import PROJECT_ROOT


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_help_names_every_part() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in PARTS)
    assert "examples:" in done.stdout


def test_a_part_that_does_not_exist_is_refused_with_those_that_do() -> None:
    done = run("speed")
    assert done.returncode == 2
    assert "no part is called speed" in done.stderr
    assert "levers" in done.stderr


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_size_that_measures_nothing_is_refused(value: str) -> None:
    done = run("write", "--rounds", value)
    assert done.returncode == 2
    assert f"argument --rounds: '{value}' is no whole number from 1 up" in done.stderr


def test_one_part_prints_a_markdown_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("levers", "--rows", "64", "--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "| the client | rows/s | client CPU |" in done.stdout
    document = json.loads(file.read_text())
    assert list(document["parts"]) == ["levers"]
    [table] = document["parts"]["levers"]
    assert len(table["rows"]) == 5
    assert document["machine"]["cores"] >= 1
    assert table["figures"]["fastest seconds"] > 0
