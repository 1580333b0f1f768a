"""What single commands touch, what they say, and with which code they end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_pipeline_tests.e2e.project import (
    Done,
    Project,
    on_another_database,
    write_table,
)

SECRET = "hunter2-not-to-be-seen"


def assert_refused(done: Done, *words: str) -> None:
    """Exit code 2 and a message for a person: no stack, no secret."""
    said = done.out + done.err
    assert done.code == 2, said
    for word in words:
        assert word in done.err, said
    assert "Traceback" not in said
    assert SECRET not in said


def test_unknown_names_are_refused_with_the_known_ones(project: Project) -> None:
    assert_refused(project.run("run", "--table", "phrase"), "'phrase'", "bora_docs", "phrases")
    assert_refused(project.run("status", "--column", "nope"), "nope", "embedding_1536")
    refused = project.run("backfill", "knowledge_chunks", "embedding_384", "--partition", "nobody")
    assert_refused(refused, "'nobody'", "it has")


def test_a_mistake_in_yaml_names_file_and_line(project: Project, folder: Path) -> None:
    path = write_table(folder, "birds", text="song", embeddings=[{"column": "v"}], tabel="x")
    done = project.run("status", EMBEDDING_PIPELINE_DEFS=str(folder))
    line = 1 + path.read_text().splitlines().index('    "tabel": "x"')
    assert_refused(done, f"{path}:{line}", "tabel", "did you mean")


def test_an_unreachable_database_is_one_sentence_without_its_password(project: Project) -> None:
    url = f"postgresql://someone:{SECRET}@127.0.0.1:1/nothing"
    for command in (("status",), ("run",), ("backfill", "phrases", "embedding_384")):
        done = project.run(*command, DATABASE_URL=url)
        assert_refused(done, "cannot connect to Postgres", "127.0.0.1", "Check DATABASE_URL")
    done = project.run("run", "--table", "phrases", DAGSTER_DATABASE_URL=url)
    assert_refused(done, "cannot connect to Postgres", "Check DAGSTER_DATABASE_URL")


def test_a_missing_key_is_named_at_start(project: Project) -> None:
    assert_refused(project.run("run", USE_EMBEDDING_API="true"), "OPENAI_API_KEY")
    wrong = project.run("status", DATABASE_URL=f"mysql://u:{SECRET}@host/db")
    assert_refused(wrong, "DATABASE_URL", "postgresql://")


def test_a_database_that_is_not_set_up_says_what_to_do(project: Project, folder: Path) -> None:
    empty = on_another_database(project, folder, "not_set_up")
    assert_refused(empty.run("status"), "no table bora_docs", "no table phrases")
    empty.sql("CREATE EXTENSION vector")
    empty.sql("CREATE TABLE phrases (id uuid PRIMARY KEY, english text, spanish text)")
    assert_refused(empty.run("status", "--table", "phrases"), "embedding-pipeline migrate")
    assert_refused(empty.run("backfill", "phrases", "embedding_384", "--dry-run"), "migrate")
    # one table can be used although the others are not there
    assert_refused(empty.run("run", "--table", "phrases", "--table", "lexicon"), "lexicon")
    assert empty.pending("phrases", "embedding_384") == 0


def test_migrate_dry_run_applies_nothing_and_hides_nothing(project: Project, folder: Path) -> None:
    mine = folder / "mine.sql"
    mine.write_text("CREATE TABLE of_mine (id int);\n")
    dry = project.run("migrate", "--dry-run", "--file", str(mine))
    assert dry.code == 0, dry.err
    assert "CREATE TABLE of_mine" in dry.out
    assert project.sql("SELECT to_regclass('of_mine')") == [(None,)]
    for said in ("mine.sql: applied", "applied before"):
        done = project.run("migrate", "--file", str(mine))
        assert done.code == 0, done.err
        assert said in done.out
    assert project.sql("SELECT count(*) FROM of_mine") == [(0,)]
    project.sql("DROP TABLE of_mine")

    write_table(folder, "nowhere", text="song", embeddings=[{"column": "v"}])
    missing = project.run("migrate", "--dry-run", EMBEDDING_PIPELINE_DEFS=str(folder))
    assert_refused(missing, "nowhere")


@pytest.mark.slow
def test_reset_empties_a_column_and_a_run_fills_it_again(project: Project) -> None:
    refused = project.run("reset", "lexicon", "embedding_1536")
    assert refused.code != 0, "without --yes and without a terminal nobody has agreed"
    assert project.pending("lexicon", "embedding_1536") == 0

    done = project.run("reset", "lexicon", "embedding_1536", "--yes")
    assert done.code == 0, done.err
    assert project.sql("SELECT count(*), count(embedding_1536) FROM lexicon") == [(225, 0)]
    assert project.pending("lexicon", "embedding_1536") == 225

    again = project.run("run", "--table", "lexicon")
    assert again.code == 0, again.out + again.err
    assert project.pending("lexicon", "embedding_1536") == 0


@pytest.fixture
def emptied(project: Project) -> Iterator[Project]:
    """`bora_docs` without some of its 384-dim vectors; complete again afterwards."""
    project.sql(
        "UPDATE bora_docs SET embedding_384 = NULL, embedding_384_fingerprint = NULL"
        " WHERE id IN (SELECT id FROM bora_docs ORDER BY id LIMIT 40)"
    )
    yield project
    assert project.run("backfill", "bora_docs", "embedding_384").code == 0


@pytest.mark.slow
def test_dry_run_touches_nothing_and_limit_and_partition_hold(emptied: Project) -> None:
    project = emptied
    rows = 40
    versions = project.sql("SELECT ctid::text, xmin::text FROM bora_docs")
    runs, stats = project.runs(), project.stats()
    dry = project.run("backfill", "bora_docs", "embedding_384", "--dry-run")
    assert dry.code == 0, dry.err
    lines = dry.out.splitlines()
    assert lines[0].startswith(f"bora_docs.embedding_384: {rows} rows, about ")
    assert "tokens, $0.0000 (tei, sentence-transformers/all-MiniLM-L6-v2)" in lines[0]
    assert len(lines) == 4  # and three rows
    assert project.sql("SELECT ctid::text, xmin::text FROM bora_docs") == versions
    assert (project.runs(), project.stats()) == (runs, stats)

    limited = project.run("backfill", "bora_docs", "embedding_384", "--limit", "7")
    assert limited.code == 0, limited.err
    assert "7 rows written" in limited.out
    assert project.pending("bora_docs", "embedding_384") == rows - 7
    assert project.stats()["inputs"] - stats["inputs"] == 7
    new = [status for run, status in project.runs().items() if run not in runs]
    assert new == ["SUCCESS"]

    month = "date_trunc('month', published_at)"
    [(partition, expected)] = project.sql(
        f"SELECT to_char({month}, 'YYYY-MM'), count(*) FROM bora_docs"
        f" WHERE embedding_384 IS NULL GROUP BY {month} ORDER BY 1 DESC LIMIT 1"
    )
    one = project.run("backfill", "bora_docs", "embedding_384", "--partition", partition)
    assert one.code == 0, one.err
    assert project.pending("bora_docs", "embedding_384") == rows - 7 - expected
    assert project.sql(
        f"SELECT count(*) FROM bora_docs WHERE embedding_384 IS NULL"
        f" AND to_char({month}, 'YYYY-MM') = $1",
        partition,
    ) == [(0,)]


@pytest.fixture
def shuffled(project: Project) -> Iterator[Project]:
    """`lexicon` with each row's vector at another row; put back afterwards."""
    project.sql("CREATE TABLE kept AS SELECT term_id, embedding_384 FROM lexicon")
    project.sql(
        "UPDATE lexicon SET embedding_384 = other.embedding_384 FROM"
        " (SELECT term_id, lag(embedding_384, 7) OVER (ORDER BY md5(term_id)) AS embedding_384"
        " FROM kept) AS other WHERE other.term_id = lexicon.term_id"
        " AND other.embedding_384 IS NOT NULL"
    )
    yield project
    project.sql(
        "UPDATE lexicon SET embedding_384 = kept.embedding_384 FROM kept"
        " WHERE kept.term_id = lexicon.term_id"
    )
    project.sql("DROP TABLE kept")


@pytest.mark.slow
def test_a_failing_check_is_exit_code_1(shuffled: Project) -> None:
    before = shuffled.stats()
    done = shuffled.run("run", "--table", "lexicon")
    assert done.code == 1, done.out + done.err
    assert "check failed: lexicon.embedding_384: golden_mrr" in done.err
    assert "error:" not in done.err
    assert shuffled.stats() == before
    assert int(done.closing_table()["lexicon.embedding_384"][9][0]) < 4
