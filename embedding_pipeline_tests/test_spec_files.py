"""Every mistake in a table's YAML is refused with file, line, key and remedy."""

import os
import re
import textwrap
from pathlib import Path

import pytest

from embedding_pipeline import spec_files
from embedding_pipeline.errors import SettingsError, SpecError
from embedding_pipeline.spec import (
    ColumnPartitions,
    EmbeddingSpec,
    HashPartitions,
    MonthPartitions,
    TableSpec,
)
from embedding_pipeline.spec_files import (
    DEFS_FOLDER,
    TableFile,
    all_table_files,
    load_table,
    load_table_files,
    table_from_attributes,
)
from embedding_pipeline_tests.conftest import Environment

pytestmark = pytest.mark.usefixtures("environment")

HERE = "# <-- here"
"""Stands on the line that a message has to name."""

RIGHT = """\
type: embedding_pipeline.EmbeddedTable
attributes:
  table: notes
  text: body
  embeddings:
    - column: embedding_384
      dimensions: 384
      provider: tei
      model: sentence-transformers/all-MiniLM-L6-v2
    - column: embedding_1536
      dimensions: 1536
      provider: local
      model: all-minilm-l6-v2-layers
      baseline: embedding_384
"""


def write(folder: Path, text: str, table: str = "notes") -> Path:
    path = folder / table / "defs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def changed(*changes: tuple[str, str]) -> str:
    """The right file with some of its text replaced."""
    text = RIGHT
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def complaints(folder: Path) -> list[str]:
    """The lines of the error about a folder of tables, the folder's path left out."""
    with pytest.raises(SpecError) as caught:
        load_table_files(folder)
    return str(caught.value).replace(f"{folder}{os.sep}", "").splitlines()


def complaint(folder: Path, text: str) -> str:
    """The one mistake in a file, without its place, which has to be the marked line."""
    path = write(folder, text)
    (line,) = complaints(folder)
    marked = [number for number, line in enumerate(text.splitlines(), 1) if HERE in line]
    where, _, message = line.partition(": ")
    assert where == f"notes/{path.name}:{marked[0] if marked else 1}", line
    return message


def load(folder: Path, text: str) -> TableFile:
    write(folder, text)
    (file,) = load_table_files(folder)
    return file


def test_a_right_file_is_read(tmp_path: Path) -> None:
    file = load(tmp_path, RIGHT)
    assert file.path == tmp_path / "notes" / "defs.yaml"
    assert file.line == 3
    assert file.golden_set_path is None
    assert file.spec.partitions == HashPartitions(by="hash", buckets=8)
    assert [embedding.column for embedding in file.spec.embeddings] == [
        "embedding_384",
        "embedding_1536",
    ]
    assert load_table(file.path) == file


def test_all_three_partitionings_are_read(tmp_path: Path) -> None:
    for written, expected in {
        "{by: hash, buckets: 3}": HashPartitions(by="hash", buckets=3),
        "{by: column, column: tenant}": ColumnPartitions(by="column", column="tenant"),
        "{by: month, column: made}": MonthPartitions(by="month", column="made"),
    }.items():
        file = load(tmp_path, changed(("  text: body\n", f"  text: b\n  partitions: {written}\n")))
        assert file.spec.partitions == expected


KNOWN_TABLE_KEYS = (
    "table, id_column, text, eligible, tenant_column, partitions, embeddings, golden_set, owners, "
    "description, rows_per_run, nightly"
)
KNOWN_EMBEDDING_KEYS = (
    "column, dimensions, provider, model, baseline, prefix, overlong, reuse, mrr_floor, "
    "baseline_ratio, recall_floor, max_pending_minutes, max_quarantined_share, max_cost, "
    "batch_size, concurrency"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed(("text: body", f"text: body\n  eligibel: x {HERE}")),
            f"eligibel: unknown key (did you mean 'eligible'?); known: {KNOWN_TABLE_KEYS}",
        ),
        (
            changed(("text: body", f"text: body\n  primary_key: x {HERE}")),
            f"primary_key: unknown key (did you mean 'id_column'?); known: {KNOWN_TABLE_KEYS}",
        ),
        (
            changed(("text: body", f"text: body\n  zzz: x {HERE}")),
            f"zzz: unknown key; known: {KNOWN_TABLE_KEYS}",
        ),
        (
            changed(("baseline: embedding_384", f"basline: embedding_384 {HERE}")),
            "embeddings.1.basline: unknown key (did you mean 'baseline'?); known: "
            + KNOWN_EMBEDDING_KEYS,
        ),
        (
            changed(
                ("text: body", f"text: body\n  partitions:\n    by: hash\n    bucket: 3 {HERE}")
            ),
            "partitions.bucket: unknown key (did you mean 'buckets'?); known: by, buckets",
        ),
        (
            changed(
                (
                    "text: body",
                    f"text: b\n  partitions: {{by: month, column: a, buckets: 3}} {HERE}",
                )
            ),
            "partitions.buckets: unknown key; known: by, column",
        ),
        (
            f"typ: embedding_pipeline.EmbeddedTable {HERE}\nattributes: {{}}\n",
            "type: is missing; a document needs `type: embedding_pipeline.EmbeddedTable` and "
            "`attributes:`",
        ),
        (
            RIGHT + f"atributes: {{}} {HERE}\n",
            "atributes: unknown key (did you mean 'attributes'?); known: type, attributes",
        ),
        (
            RIGHT + f"golden_set: x {HERE}\n",
            "golden_set: belongs under attributes:; indent it",
        ),
        (
            RIGHT + f"post_processing: {{}} {HERE}\n",
            "post_processing: unknown key; known: type, attributes",
        ),
    ],
)
def test_an_unknown_key_is_refused_at_every_level(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(tmp_path, text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed(("attributes:", f"attributes: {HERE}"), ("  table: notes\n", "")),
            "table: is missing: The source table: name, or schema.name.",
        ),
        (
            changed(("attributes:", f"attributes: {HERE}"), ("  text: body\n", "")),
            "text: is missing: A column, or an SQL expression over the row.",
        ),
        (
            changed(
                ("- column: embedding_1536", f"- column: embedding_1536 {HERE}"),
                ("      model: all-minilm-l6-v2-layers\n", ""),
            ),
            "embeddings.1.model: is missing: The model's name, as its provider knows it; such as "
            "sentence-transformers/all-MiniLM-L6-v2.",
        ),
        (
            changed(
                ("    - column: embedding_1536\n      dim", "    -\n      dim"),
                ("dimensions: 1536", f"dimensions: 1536 {HERE}"),
            ),
            "embeddings.1.column: is missing: The vector column's name.",
        ),
        (
            changed(("text: body", f"text: body\n  partitions: {{by: month}} {HERE}")),
            "partitions.column: is missing: The date or timestamp column.",
        ),
        (
            changed(("text: body", f"text: body\n  embeddings: [] {HERE}")).partition(
                "  embeddings:\n"
            )[0],
            "embeddings: must not be empty: The embedding columns, each with its model.",
        ),
        (
            f"type: embedding_pipeline.EmbeddedTable {HERE}\n",
            "attributes: expected keys and values: table, text, embeddings …",
        ),
        (
            f"type: embedding_pipeline.EmbeddedTable\nattributes: {HERE}\n",
            "attributes: expected keys and values: table, text, embeddings …",
        ),
        (
            f"type: embedding_pipeline.EmbeddedTable\nattributes: [notes] {HERE}\n",
            "attributes: expected keys and values: table, text, embeddings …",
        ),
    ],
)
def test_a_missing_key_is_named_with_what_belongs_there(
    tmp_path: Path, text: str, message: str
) -> None:
    assert complaint(tmp_path, text) == message


NOT_TEXT = "expected text (in quotes, where YAML would read it as something else)"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table: notes", "table: 2024", f"table: {NOT_TEXT}, not 2024"),
        ("table: notes", "table: yes", f"table: {NOT_TEXT}, not True"),
        ("table: notes", "table:", f"table: {NOT_TEXT}"),
        ("text: body", "text: [body]", f"text: {NOT_TEXT}"),
        ("text: body", "text: '  '", "text: must not be blank: a column's name, or an SQL "
         "expression over the row"),
        ("text: body", "text: b\n  id_column: 7", "id_column: expected a column's name, or a list "
         "of names, not 7"),
        ("text: body", "text: b\n  id_column: []", "id_column: must not be empty: The primary "
         "key's column; a list for a composite key."),
        ("text: body", "text: b\n  id_column: [a, a]", "id_column: names a column twice"),
        ("text: body", "text: b\n  id_column: [a, 5]", f"id_column.1: {NOT_TEXT}, not 5"),
        ("text: body", "text: b\n  golden_set: ''", "golden_set: must not be empty: File beside "
         "this one: queries with the keys that they should find."),
        ("text: body", "text: b\n  nightly: at three", "nightly: write {at: \"03:30\", timezone: "
            "Europe/Madrid}, or false, not 'at three'"),
        ("text: body", "text: b\n  nightly: {at: 13:30}", "nightly.at: must be a time of day from "
            "\"00:00\" to \"23:59\", in quotes"),
        ("text: body", "text: b\n  nightly: {at: '3:30'}", "nightly.at: must be a time of day from "
            "\"00:00\" to \"23:59\", in quotes"),
        ("text: body", "text: b\n  nightly: {timezone: Madrit}", "nightly.timezone: 'Madrit' is no "
            "time zone; write an IANA name such as UTC or Europe/Madrid"),
        ("text: body", "text: b\n  nightly: {hour: 3}", "nightly.hour: unknown key; known: "
            "enabled, at, timezone"),
        ("text: body", "text: b\n  owners: [bob]", "owners.0: must be an email address, or a team "
         "written team:name"),
        ("text: body", "text: b\n  rows_per_run: 0", "rows_per_run: must be greater than or equal "
         "to 1, not 0"),
        ("text: body", "text: b\n  7: x", "7: a key has to be text; put it in quotes"),
        ("text: body", 'text: "a\\0b"', "text: has a NUL character, which Postgres cannot store"),
        ("dimensions: 384", "dimensions: wide", "embeddings.0.dimensions: expected a whole number, "
         "not 'wide'"),
        ("dimensions: 384", "dimensions: 384.5", "embeddings.0.dimensions: expected a whole "
         "number, not 384.5"),
        ("dimensions: 384", "dimensions: yes", "embeddings.0.dimensions: expected a number (YAML "
         "reads yes and on as true), not True"),
        ("dimensions: 384", "dimensions:", "embeddings.0.dimensions: expected a whole number"),
        ("dimensions: 384", "dimensions: 0", "embeddings.0.dimensions: must be greater than or "
         "equal to 1, not 0"),
        ("baseline: embedding_384", "overlong: cut", "embeddings.1.overlong: must be 'truncate' or "
         "'quarantine', not 'cut'"),
        ("baseline: embedding_384", "reuse: perhaps", "embeddings.1.reuse: expected true or false, "
         "not 'perhaps'"),
        ("baseline: embedding_384", "mrr_floor: high", "embeddings.1.mrr_floor: expected a number, "
         "not 'high'"),
        ("baseline: embedding_384", "mrr_floor: 30", "embeddings.1.mrr_floor: must be less than or "
         "equal to 1, not 30"),
        ("baseline: embedding_384", "mrr_floor: .nan", "embeddings.1.mrr_floor: expected a finite "
         "number, not nan"),
        ("baseline: embedding_384", "max_pending_minutes: .inf", "embeddings.1.max_pending_minutes:"
         " expected a finite number, not inf"),
        ("baseline: embedding_384", "mrr_floor: on", "embeddings.1.mrr_floor: expected a number "
         "(YAML reads yes and on as true), not True"),
    ],
)  # fmt: skip
def test_a_wrong_type_says_what_was_expected_and_what_stands_there(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert complaint(tmp_path, changed((old, f"{new} {HERE}"))) == message


@pytest.mark.parametrize(
    "written", ["hash", "[hash]", "{}", "{by: day}", "{buckets: 3}", "", "{by: }", "7"]
)
def test_an_unknown_partitioning_is_answered_with_the_known_ones(
    tmp_path: Path, written: str
) -> None:
    assert complaint(
        tmp_path, changed(("text: body", f"text: b\n  partitions: {written} {HERE}"))
    ) == (
        "partitions: write one of {by: hash, buckets: 8}, {by: column, column: …}, "
        "{by: month, column: …}"
    )


def test_embeddings_have_to_be_a_list_of_keys_and_values(tmp_path: Path) -> None:
    head = RIGHT.partition("  embeddings:")[0]
    assert (
        complaint(tmp_path, head + f"  embeddings: {{column: a}} {HERE}\n")
        == "embeddings: expected a list"
    )
    assert (
        complaint(tmp_path, head + f"  embeddings:\n    - embedding_384 {HERE}\n")
        == "embeddings.0: expected keys and values, not 'embedding_384'"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [
                ("column: embedding_1536", f"column: embedding_384 {HERE}"),
                ("      baseline: embedding_384\n", ""),
            ],
            "embeddings.1.column: 'embedding_384' is named twice; a column holds one model's "
            "vectors only, so give each its own column",
        ),
        (
            [("baseline: embedding_384", f"baseline: embedding_385 {HERE}")],
            "embeddings.1.baseline: 'embedding_385' is not an embedding column of this table; "
            "known: embedding_384, embedding_1536",
        ),
        (
            [("baseline: embedding_384", f"baseline: embedding_1536 {HERE}")],
            "embeddings.1.baseline: embedding_1536 cannot be compared with itself; name another "
            "column (embedding_384), or leave the key out",
        ),
        (
            [("dimensions: 384", f"dimensions: 768 {HERE}")],
            "embeddings.0.dimensions: sentence-transformers/all-MiniLM-L6-v2 gives 384 dimensions, "
            "not 768; write dimensions: 384, or name another model",
        ),
        (
            [
                ("dimensions: 1536", f"dimensions: 1537 {HERE}"),
                ("model: all-minilm-l6-v2-layers", "model: text-embedding-3-small"),
            ],
            "embeddings.1.dimensions: text-embedding-3-small gives 1 to 1536 dimensions, not 1537; "
            "write dimensions: 1536, or name another model",
        ),
        (
            [
                ("dimensions: 1536", f"dimensions: 3072 {HERE}"),
                ("model: all-minilm-l6-v2-layers", "model: text-embedding-3-large"),
            ],
            "embeddings.1.dimensions: must be at most 2000, pgvector's limit for an HNSW index; "
            "ask the model for fewer, or take another model",
        ),
        (
            [("provider: local", f"provider: opnai {HERE}")],
            "embeddings.1.provider: there is no provider 'opnai' (did you mean 'openai'?); known: "
            "tei, openai, local; declare further ones in providers.yaml",
        ),
        (
            [("text: body", "text: b\n  id_column: embedding_1536"),
             ("- column: embedding_1536", f"- column: embedding_1536 {HERE}")],
            "embeddings.1.column: column 'embedding_1536' would hold the vectors of "
            "'embedding_1536', but is already the key; name the embedding column otherwise",
        ),
        (
            [("text: body", "text: b\n  tenant_column: embedding_1536"),
             ("- column: embedding_1536", f"- column: embedding_1536 {HERE}")],
            "embeddings.1.column: column 'embedding_1536' would hold the vectors of "
            "'embedding_1536', but is already the tenant column; name the embedding column "
            "otherwise",
        ),
        (
            [("text: body", "text: b\n  partitions: {by: column, column: embedding_1536}"),
             ("- column: embedding_1536", f"- column: embedding_1536 {HERE}")],
            "embeddings.1.column: column 'embedding_1536' would hold the vectors of "
            "'embedding_1536', but is already the partition column; name the embedding column "
            "otherwise",
        ),
        (
            [("column: embedding_1536", f"column: embedding_384_fingerprint {HERE}")],
            "embeddings.1.column: column 'embedding_384_fingerprint' would hold the vectors of "
            "'embedding_384_fingerprint', but is already the fingerprints of 'embedding_384'; "
            "name the embedding column otherwise",
        ),
        (
            [("column: embedding_1536", f"column: embedding_384_index {HERE}")],
            "embeddings.1.column: Dagster's asset 'embedding_384_index' would be both the index of "
            "'embedding_384' and the column 'embedding_384_index'; name the embedding column "
            "otherwise",
        ),
        (
            [("column: embedding_1536", f"column: retrieval_quality {HERE}")],
            "embeddings.1.column: Dagster's asset 'retrieval_quality' would be both the table's "
            "evaluation and the column 'retrieval_quality'; name the embedding column otherwise",
        ),
        (
            [("column: embedding_1536", f"column: {'é' * 32} {HERE}")],
            "embeddings.1.column: is longer than 63 bytes, where Postgres cuts names: "
            f"{'é' * 20}…",
        ),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_together_are_refused(
    tmp_path: Path, changes: list[tuple[str, str]], message: str
) -> None:
    assert complaint(tmp_path, changed(*changes)) == message


@pytest.mark.parametrize(
    "name", ["a.b.c", "''", "' notes'", ".notes", "notes.", "'\"notes'", "' '"]
)
def test_what_is_no_table_name_is_refused(tmp_path: Path, name: str) -> None:
    message = complaint(tmp_path, changed(("table: notes", f"table: {name} {HERE}")))
    assert message.startswith("table: ")
    assert "is not a table name; write table, schema.table or, for a name with dots" in message


def test_a_table_name_that_postgres_would_cut_is_refused(tmp_path: Path) -> None:
    message = complaint(tmp_path, changed(("table: notes", f"table: s.{'n' * 64} {HERE}")))
    assert message.startswith("table: is longer than 63 bytes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"type: embedding_pipeline.EmbeddedTable\nattributes: {{table: notes\n  text: x {HERE}",
            "not valid YAML: expected ',' or '}', but got",
        ),
        (f"type: a\n\tattributes: x {HERE}", "not valid YAML: found character '\\t' that cannot"),
        (f"type: *unknown {HERE}", "not valid YAML: found undefined alias"),
        (f"type: !python/name:os.system x {HERE}", "not valid YAML: could not determine a constr"),
        (f"type: a {HERE}\x07", "not valid YAML: it does not allow the character U+0007; remove"),
        (f"{{[1]: 2}}: x {HERE}", "not valid YAML: found unhashable key"),
        (
            changed(("text: body", f"text: body\n  description: 2025-02-30 {HERE}")),
            "not valid YAML: day is out of range for month; put the value in quotes",
        ),
        (
            f"type: x\nattributes: &all\n  again: {HERE}\n    *all\n",
            "",
        ),
    ],
)
def test_invalid_yaml_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    if not message:
        write(tmp_path, text)
        assert complaints(tmp_path) == [
            "notes/defs.yaml:3: attributes.again: an alias stands inside what it names; write the "
            "value itself"
        ]
        return
    assert complaint(tmp_path, text).startswith(message)


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    """PyYAML takes the last one without a word."""
    text = changed(("text: body", f"text: body\n  table: other {HERE}"))
    assert complaint(tmp_path, text) == (
        "table: is written twice, first in line 3; leave one of them"
    )
    text = changed(("baseline: embedding_384", f"model: other {HERE}"))
    assert complaint(tmp_path, text) == (
        "model: is written twice, first in line 13; leave one of them"
    )


def test_anchors_and_merges_are_yaml_like_any_other(tmp_path: Path) -> None:
    text = """\
type: embedding_pipeline.EmbeddedTable
attributes:
  table: notes
  text: body
  embeddings:
    - &first
      column: embedding_384
      dimensions: 384
      provider: tei
      model: sentence-transformers/all-MiniLM-L6-v2
    - <<: *first
      column: other
"""
    assert load(tmp_path, text).spec.embeddings[1].dimensions == 384


def test_a_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(b"type: x\nattributes:\n  table: se\xf1as\n")
    assert complaints(tmp_path) == [
        "notes/defs.yaml:3: not UTF-8 text (invalid continuation byte); save the file as UTF-8"
    ]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + RIGHT).spec.table == "notes"


@pytest.mark.parametrize("text", ["", "\n\n", "# type: embedding_pipeline.EmbeddedTable\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    """Dagster says "No components found in YAML file", and the command line said nothing."""
    assert complaint(tmp_path, text) == "the file is empty"


@pytest.mark.parametrize(
    "text", [f"---\n... {HERE}\n", f"notes {HERE}", f"- type: x {HERE}", f"attributes: {{}} {HERE}"]
)
def test_a_document_without_type_is_refused(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, text) == (
        "type: is missing; a document needs `type: embedding_pipeline.EmbeddedTable` and "
        "`attributes:`"
    )


@pytest.mark.parametrize(
    "kind",
    [
        "embedding_pipeline.EmbededTable",
        "embedding_pipelines.EmbeddedTable",
        "embedding_pipeline.components.embedded_table.EmbeddedTable",
        "EmbeddedTable",
        "7",
        "",
    ],
)
def test_a_misspelt_type_is_refused(tmp_path: Path, kind: str) -> None:
    message = complaint(
        tmp_path, changed(("type: embedding_pipeline.EmbeddedTable", f"type: {kind} {HERE}"))
    )
    assert message.startswith("type: unknown type")
    assert message.endswith("write embedding_pipeline.EmbeddedTable")


def test_other_components_are_dagsters_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "type: dagster.DefsFolderComponent\n"
    assert complaint(tmp_path, text).startswith("type: unknown type")
    monkeypatch.setattr(spec_files, "DEFS_FOLDER", tmp_path)
    assert load_table_files(tmp_path) == []
    write(tmp_path, RIGHT, "group/notes")
    (tmp_path / "notes" / "defs.yaml").rename(tmp_path / "group" / "defs.yaml")
    assert [file.spec.table for file in load_table_files(tmp_path)] == ["notes"]


def test_keys_that_dagster_acts_on_belong_to_the_packages_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec_files, "DEFS_FOLDER", tmp_path)
    assert load(tmp_path, RIGHT + "requirements: {env: [DATABASE_URL]}\n").spec.table == "notes"


def test_the_golden_set_has_to_lie_beside_the_file(tmp_path: Path) -> None:
    text = changed(("text: body", f"text: body\n  golden_set: golden.jsonl {HERE}"))
    assert complaint(tmp_path, text) == (
        "golden_set: there is no file 'golden.jsonl' beside defs.yaml; write it, or leave the key "
        "out"
    )
    (tmp_path / "notes" / "golden.jsonl").mkdir()
    assert "there is no file" in complaint(tmp_path, text)
    (tmp_path / "notes" / "golden.jsonl").rmdir()
    (tmp_path / "notes" / "golden.jsonl").touch()
    assert load(tmp_path, text).golden_set_path == tmp_path / "notes" / "golden.jsonl"


@pytest.mark.parametrize("name", ["defs.yml", "component.yaml"])
def test_a_file_that_only_dagster_would_read_has_to_be_renamed(tmp_path: Path, name: str) -> None:
    """Otherwise the UI would show a table that the command line does not know."""
    write(tmp_path, RIGHT).rename(tmp_path / "notes" / name)
    assert complaints(tmp_path) == [
        f"notes/{name}:1: the file has to be called defs.yaml; rename it"
    ]


def test_a_table_inside_another_tables_folder_is_refused(tmp_path: Path) -> None:
    """Dagster does not look there: the command line would know a table that the UI does not."""
    write(tmp_path, RIGHT)
    write(tmp_path, changed(("table: notes", "table: inner")), "notes/inner")
    above = tmp_path / "notes" / "defs.yaml"
    with pytest.raises(SpecError) as caught:
        load_table_files(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'notes' / 'inner' / 'defs.yaml'}:1: lies in the folder of another table "
        f"({above}), where Dagster does not look; move it beside that folder"
    )


def test_hidden_folders_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "type: ", ".trash/notes")
    write(tmp_path, "type: ", "notes/__pycache__")
    assert load(tmp_path, RIGHT).spec.table == "notes"


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    write(
        tmp_path, changed(("  text: body\n", "  txt: body\n"), ("dimensions: 384", "dimensions: x"))
    )
    write(tmp_path, "", "empty")
    write(tmp_path, changed(("table: notes", "table: fine")), "fine")
    assert [line.rpartition(": ")[0].partition("; ")[0] for line in complaints(tmp_path)] == [
        "empty/defs.yaml:1",
        "notes/defs.yaml:2: text: is missing",
        "notes/defs.yaml:7: embeddings.0.dimensions",
        "notes/defs.yaml:4: txt: unknown key (did you mean 'text'?)",
    ]


@pytest.mark.parametrize("again", ["notes", "public.notes", "'\"notes\"'", "'public.\"notes\"'"])
def test_a_table_declared_twice_names_both_places(tmp_path: Path, again: str) -> None:
    write(tmp_path, RIGHT, "a")
    write(tmp_path, changed(("table: notes", f"table: {again}")), "b")
    (line,) = complaints(tmp_path)
    assert line.startswith("b/defs.yaml:3: table: ")
    assert line.endswith(
        "is also declared in a/defs.yaml:3; put all its embedding columns into one file"
    )


def test_two_tables_in_one_file(tmp_path: Path) -> None:
    second = changed(("table: notes", "table: letters"))
    path = write(tmp_path, f"# tables\n{RIGHT}---\n{second}")
    assert [file.spec.table for file in load_table_files(tmp_path)] == ["letters", "notes"]
    assert [file.line for file in load_table_files(tmp_path)] == [19, 4]
    assert load_table(path, 2).spec.table == "notes"
    assert load_table(path, 17).spec.table == "letters"
    write(tmp_path, f"{RIGHT}---\n{RIGHT}")
    assert "is also declared in notes/defs.yaml:3" in complaints(tmp_path)[0]


def test_names_that_dagster_would_give_to_two_steps_are_refused(tmp_path: Path) -> None:
    """Dagster joins `[a__b, c]` and `[a, b__c]` to one step name and says so without a file."""
    write(
        tmp_path,
        changed(("table: notes", "table: a__b"), ("column: embedding_1536", "column: c")),
        "one",
    )
    write(
        tmp_path,
        changed(("table: notes", "table: a"), ("column: embedding_1536", "column: b__c")),
        "two",
    )
    assert complaints(tmp_path) == [
        "two/defs.yaml:3: table: Dagster would call a step of a 'a__b__c', as one of a__b "
        "(one/defs.yaml:3); rename an embedding column"
    ]


def test_names_that_two_indexes_would_share_are_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        changed(("table: notes", "table: a_b"), ("column: embedding_1536", "column: c")),
        "one",
    )
    write(
        tmp_path,
        changed(("table: notes", "table: a"), ("column: embedding_1536", "column: b_c")),
        "two",
    )
    assert complaints(tmp_path) == [
        "two/defs.yaml:3: table: the index a_b_c_pending of b_c would have the name of one of a_b "
        "(one/defs.yaml:3); rename an embedding column"
    ]


def test_names_that_only_look_alike_are_tables_of_their_own(tmp_path: Path) -> None:
    names = ["a.b", "a_x2e_b", "'\"a.b\"'", "a_b", "A_b", "other.notes", "notes"]
    for number, name in enumerate(names):
        write(tmp_path, changed(("table: notes", f"table: {name}")), str(number))
    files = load_table_files(tmp_path)
    assert len(files) == len(names)
    assert len({file.spec.asset_name for file in files}) == len(names)


class TestTemplates:
    """`{{ … }}`"""

    def test_numbers_and_models_come_from_the_environment(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        environment(
            EMBEDDING_OPENAI_MODEL="text-embedding-3-large", EMBEDDING_OPENAI_DIMENSIONS="1024"
        )
        file = load(
            tmp_path,
            changed(
                ("dimensions: 1536", 'dimensions: "{{ env.EMBEDDING_OPENAI_DIMENSIONS }}"'),
                ("model: all-minilm-l6-v2-layers", 'model: "{{ env.EMBEDDING_OPENAI_MODEL }}"'),
                ("baseline: embedding_384", "prefix: \"{{ env('PREFIX', 'query: ') }}\""),
            ),
        )
        embedding = file.spec.embeddings[1]
        assert embedding.model == "text-embedding-3-large"
        assert embedding.dimensions == 1024
        assert embedding.prefix == "query: "

    def test_a_number_that_is_none_is_refused_without_its_value(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        environment(WIDTH="sk-secret")
        text = changed(("dimensions: 384", f'dimensions: "{{{{ env.WIDTH }}}}" {HERE}'))
        assert complaint(tmp_path, text) == (
            "embeddings.0.dimensions: expected a whole number, not '{{ env.WIDTH }}'"
        )

    @pytest.mark.parametrize("value", [None, "", "  "])
    @pytest.mark.parametrize(
        "template", ["{{ env.A_MODEL }}", "{{ env('A_MODEL') }}", "x-{{ env.A_MODEL }}"]
    )
    def test_an_unset_variable_is_our_error(
        self,
        tmp_path: Path,
        environment: Environment,
        monkeypatch: pytest.MonkeyPatch,
        template: str,
        value: str | None,
    ) -> None:
        monkeypatch.delenv("A_MODEL", raising=False)
        if value is not None:
            environment(A_MODEL=value)
        text = changed(("model: all-minilm-l6-v2-layers", f'model: "{template}" {HERE}'))
        assert complaint(tmp_path, text) == (
            f"embeddings.1.model: {template!r} cannot be resolved: the environment variable "
            "A_MODEL is not set; set it, or write the value itself"
        )

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ model }}", "'model' is undefined; there are env.NAME, embedding_api.provider and"),
            ("{{ embedding_api.width }}", "'dict object' has no attribute 'width'; there are env."),
            ("{{ 1 / 0 }}", "division by zero; there are"),
            ("{{ env.HOME", "unexpected end of template"),
            ("{{ env.__class__.__mro__ }}", "access to attribute '__class__' of"),
        ],
    )
    def test_any_other_template_that_fails_is_our_error_too(
        self, tmp_path: Path, template: str, message: str
    ) -> None:
        text = changed(("model: all-minilm-l6-v2-layers", f'model: "{template}" {HERE}'))
        assert complaint(tmp_path, text).startswith(
            f"embeddings.1.model: {template!r} cannot be resolved: {message}"
        )

    def test_braces_that_are_no_template_can_be_written(self, tmp_path: Path) -> None:
        file = load(tmp_path, changed(("text: body", "text: \"body || '{{ '{{' }}'\"")))
        assert file.spec.text == "body || '{{'"

    def test_a_variable_keeps_its_outer_blanks(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        """`passage: ` and `passage:` are two recipes."""
        environment(PREFIX="passage: ")
        file = load(tmp_path, changed(("baseline: embedding_384", 'prefix: "{{ env.PREFIX }}"')))
        assert file.spec.embeddings[1].prefix == "passage: "

    @pytest.mark.parametrize(
        ("variables", "provider", "model"),
        [
            ({}, "local", "all-minilm-l6-v2-layers"),
            ({"OPENAI_API_KEY": "sk-x"}, "local", "all-minilm-l6-v2-layers"),
            (
                {"OPENAI_API_KEY": "sk-x", "EMBEDDING_OPENAI_MODEL": "text-embedding-3-large"},
                "local",
                "all-minilm-l6-v2-layers",
            ),
            (
                {"OPENAI_API_KEY": "sk-x", "EMBEDDING_MODE": "openai"},
                "local",
                "all-minilm-l6-v2-layers",
            ),
            (
                {"OPENAI_API_KEY": "sk-x", "USE_EMBEDDING_API": "false"},
                "local",
                "all-minilm-l6-v2-layers",
            ),
            (
                {"OPENAI_API_KEY": "sk-x", "USE_EMBEDDING_API": "true"},
                "openai",
                "text-embedding-3-small",
            ),
        ],
    )  # fmt: skip
    def test_one_switch_alone_decides_the_shipped_tables_model(
        self, environment: Environment, variables: dict[str, str], provider: str, model: str
    ) -> None:
        """A key that merely happens to be set must not spend anything."""
        environment(**variables)
        files = load_table_files()
        assert len(files) == 4
        for file in files:
            narrow, wide = file.spec.embeddings
            assert (narrow.provider, narrow.model) == (
                "tei",
                "sentence-transformers/all-MiniLM-L6-v2",
            )
            assert (wide.provider, wide.model) == (provider, model)
            assert (narrow.dimensions, wide.dimensions) == (384, 1536)


class TestExtraFolder:
    """EMBEDDING_PIPELINE_DEFS"""

    def test_its_tables_stand_beside_the_shipped_ones(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        write(tmp_path, RIGHT)
        environment(EMBEDDING_PIPELINE_DEFS=str(tmp_path))
        assert [file.spec.table for file in all_table_files()] == [
            "bora_docs",
            "knowledge_chunks",
            "lexicon",
            "notes",
            "phrases",
        ]

    def test_without_it_there_are_the_shipped_ones(self) -> None:
        assert all_table_files() == load_table_files()
        assert all(file.path.is_relative_to(DEFS_FOLDER) for file in all_table_files())

    def test_a_table_that_is_shipped_cannot_be_declared_again(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        write(tmp_path, changed(("table: notes", "table: public.lexicon")))
        environment(EMBEDDING_PIPELINE_DEFS=str(tmp_path))
        with pytest.raises(
            SpecError, match=r"notes/defs\.yaml:3: .* is also declared in .*lexicon"
        ):
            all_table_files()

    def test_the_shipped_folder_itself_may_be_named(self, environment: Environment) -> None:
        environment(EMBEDDING_PIPELINE_DEFS=str(DEFS_FOLDER))
        assert len(all_table_files()) == 4

    def test_a_folder_that_does_not_exist_is_named(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        environment(EMBEDDING_PIPELINE_DEFS=str(tmp_path / "nowhere"))
        with pytest.raises(SettingsError) as caught:
            all_table_files()
        assert str(caught.value) == (
            f"EMBEDDING_PIPELINE_DEFS: there is no folder {tmp_path / 'nowhere'}; make it, with a "
            "folder for each table in it, or unset the variable"
        )


def test_attributes_without_a_file_are_checked_alike(tmp_path: Path) -> None:
    embedding = {"column": "e", "dimensions": 4, "provider": "tei", "model": "m"}
    attributes = {"table": "notes", "text": "body", "embeddings": [embedding]}
    assert table_from_attributes(attributes, tmp_path).spec.table == "notes"
    with pytest.raises(SpecError) as caught:
        table_from_attributes({**attributes, "txt": 1}, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'defs.yaml'}: txt: unknown key")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_table(tmp_path / "defs.yaml")
    assert (
        str(caught.value) == f"{tmp_path / 'defs.yaml'}: cannot be read: No such file or directory"
    )


def test_the_example_in_the_readme_is_right(tmp_path: Path) -> None:
    readme = (DEFS_FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")
    example = re.search(r"(?:^    .*\n)+", readme.partition("defs.yaml`:\n")[2], re.MULTILINE)
    assert example is not None
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "golden_set.jsonl").touch()
    file = load(tmp_path, textwrap.dedent(example[0]))
    assert file.spec.tenant_column == "tenant_id"


def test_the_readme_names_every_key() -> None:
    readme = (DEFS_FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")
    for key in [*TableSpec.model_fields, *EmbeddingSpec.model_fields]:
        assert re.search(rf"\b{key}\b", readme), key
