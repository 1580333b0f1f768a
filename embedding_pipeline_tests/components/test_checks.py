"""The four checks, in real Dagster runs: they fail when they should and are calm when they may."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline import main_job
from embedding_pipeline.components import checks as subject
from embedding_pipeline.components import names
from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.lease import Lease
from embedding_pipeline.store.pending import count_by_partition
from embedding_pipeline_tests.faults.server import FaultServer, Status
from embedding_pipeline_tests.rows import make_column, pretend_filled
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
ALL = ("coverage", "vectors_valid", "golden_mrr", "index_recall")


@dataclass(frozen=True)
class Said:
    """What a check said in a run."""

    passed: bool
    severity: str
    evaluated: bool
    words: str


class Project:
    """One table in Dagster, with an instance of its own."""

    def __init__(self, file: TableFile, column: Column, database: str, server: FaultServer) -> None:
        self.file, self.column, self.database, self.server = file, column, database, server
        self.instance = dg.DagsterInstance.ephemeral()
        self.key = names.column_key(file.spec, column.embedding)
        self.index = names.index_key(file.spec, column.embedding)
        self.quality = names.quality_key(file.spec)
        self.job = dg.Definitions.merge(table_definitions(file)).get_implicit_global_asset_job_def()

    def run(
        self,
        *assets: dg.AssetKey,
        checks: tuple[str, ...] = ALL,
        partitions: tuple[str, str] | None = None,
        config: dict[str, Any] | None = None,
    ) -> dict[str, Said]:
        subset = self.job.get_subset(
            asset_selection=set(assets),
            asset_check_selection={dg.AssetCheckKey(self.key, name) for name in checks},
        )
        op = self.key.to_python_identifier()
        result = subset.execute_in_process(
            instance=self.instance,
            tags=names.range_tags(*partitions) if partitions else {},
            run_config={"ops": {op: {"config": config}}} if config else {},
        )
        return {
            found.check_name: Said(
                found.passed,
                found.severity.value,
                bool(found.metadata["evaluated"].value),
                found.description or "",
            )
            for found in result.get_asset_check_evaluations()
        }

    def embed(self, *partitions: str, **options: Any) -> dict[str, Said]:
        """Materialise a range of partitions (all that are pending) with the cheap checks."""
        connection_counts = self.pending()
        names.add_partitions(self.instance, self.file.spec, sorted(connection_counts))
        order = names.known_partitions(self.instance, self.file.spec)
        first, last = (partitions[0], partitions[-1]) if partitions else (order[0], order[-1])
        return self.run(self.key, partitions=(first, last), **options)

    def pending(self) -> dict[str, int]:
        with psycopg.connect(self.database, autocommit=True, cursor_factory=psycopg.RawCursor) as c:
            return count_by_partition(c, self.column)

    def nightly(self, *checks: str) -> dict[str, Said]:
        """The thorough checks by themselves."""
        return self.run(checks=checks or ALL)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    with FaultServer(dimensions=4, model="test-model-4") as server:
        monkeypatch.setenv("EMBEDDING_SERVICE_URL", server.tei_url)
        yield server
    load_settings.cache_clear()


@pytest.fixture
def project(
    database: str,
    connection: Connection,
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    """Sixty rows in four tenants; the golden set's queries are texts of theirs."""
    monkeypatch.setenv("DATABASE_URL", database)
    load_settings.cache_clear()
    create_docs(connection, 60)
    table = spec(golden_set="golden_set.jsonl")
    lines = [{"query": f"text number {n}", "expected": [n]} for n in range(1, 21)]
    (tmp_path / "golden_set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    column = make_column(connection, table)
    return Project(TableFile(table, tmp_path / "defs.yaml"), column, database, server)


@pytest.fixture
def complete(project: Project) -> Project:
    """The same, embedded, indexed and evaluated."""
    project.embed(checks=())
    assert project.pending() == {}
    project.run(project.index, project.quality, checks=())
    return project


def since(connection: Connection, hours: int) -> None:
    """As if the column had been pending for so long, and no run had come since."""
    connection.execute("UPDATE embedding_pipeline.lease SET emptied_at = NULL")
    connection.execute(
        "UPDATE embedding_pipeline.embedding_column"
        f" SET pending_since = now() - interval '{hours} h'".encode()
    )


def test_a_complete_column_passes_all_four(complete: Project) -> None:
    said = complete.nightly()
    assert {name: found.passed for name, found in said.items()} == dict.fromkeys(ALL, True), said


def test_what_an_index_build_says_is_in_the_run_s_log_and_on_the_command_line(
    project: Project,
) -> None:
    project.embed(checks=())
    heard: list[str] = []
    main_job._execute(project.instance, project.job, [project.index], [], {}, {}, say=heard.append)
    line = "build the hnsw index docs_embedding_4_hnsw of docs.embedding_4"
    assert heard[0] == line
    [run] = project.instance.get_runs(limit=1)
    assert line in [entry.user_message for entry in project.instance.all_logs(run.run_id)]
    # the next run of this process is nobody's
    project.run(project.index, checks=())
    assert heard.count(line) == 1


def test_one_run_of_everything_judges_what_it_made(project: Project) -> None:
    project.embed(checks=())
    said = project.run(project.index, project.quality, checks=ALL)
    assert all(found.passed and found.evaluated for found in said.values()), said


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE docs SET embedding_4 = NULL WHERE id = 30",
        "UPDATE docs SET body = 'edited' WHERE id = 30",
    ],
)
def test_coverage_warns_at_first_and_fails_when_rows_have_waited(
    complete: Project, connection: Connection, change: str
) -> None:
    connection.execute(change.encode())

    fresh = complete.nightly("coverage")["coverage"]
    assert (fresh.passed, fresh.severity, fresh.evaluated) == (False, "WARN", True)
    assert "1 rows are pending" in fresh.words
    since(connection, 2)
    old = complete.nightly("coverage")["coverage"]
    assert (old.passed, old.severity) == (False, "ERROR")


@pytest.mark.parametrize(("refused", "passed"), [(2, True), (3, False)])
def test_coverage_fails_past_the_share_of_refused_rows_that_the_yaml_allows(
    project: Project, refused: int, passed: bool
) -> None:
    table = spec(embeddings=[embedding(max_quarantined_share=0.04)])
    file = TableFile(table, project.file.path)
    project = Project(file, project.column, project.database, project.server)
    texts = [f"text number {n}" for n in range(1, 1 + refused)]
    project.server.poison = {text: Status(400, words="not this") for text in texts}

    for said in (project.embed(checks=("coverage",)), project.nightly("coverage")):
        coverage = said["coverage"]
        assert (coverage.passed, coverage.evaluated) == (passed, True), coverage
        if passed:
            assert f"{refused} quarantined" in coverage.words
        else:
            assert coverage.severity == "ERROR"
            assert "3 rows (5.0%) are quarantined, more than 4.0%" in coverage.words


def test_shuffled_vectors_fail_the_golden_set(complete: Project, connection: Connection) -> None:
    connection.execute(
        "UPDATE docs SET embedding_4 = other.embedding_4 FROM docs AS other"
        " WHERE other.id = 1 + (docs.id + 30) % 60"
    )
    said = complete.nightly()
    assert (said["golden_mrr"].passed, said["golden_mrr"].severity) == (False, "ERROR"), said
    assert said["coverage"].passed, "the fingerprints still say that all is well"


def test_a_zero_vector_is_found(complete: Project, connection: Connection) -> None:
    connection.execute("UPDATE docs SET embedding_4 = '[0,0,0,0]' WHERE id = 30")
    said = complete.nightly("vectors_valid")["vectors_valid"]
    assert (said.passed, said.severity) == (False, "ERROR")
    assert "zeros" in said.words


def test_a_dropped_index_is_found_and_one_that_is_not_due_is_not(
    complete: Project, connection: Connection
) -> None:
    connection.execute(f'DROP INDEX "{complete.column.hnsw_index}"'.encode())

    for said in (complete.nightly("index_recall"), complete.embed("a", "c")):
        assert (said["index_recall"].passed, said["index_recall"].severity) == (False, "ERROR")

    connection.execute("UPDATE docs SET body = 'edited' WHERE id = 30")
    said = complete.nightly("index_recall")
    assert (said["index_recall"].severity, said["index_recall"].evaluated) == ("WARN", False)


def test_what_was_not_evaluated_never_passes(project: Project) -> None:
    said = project.nightly()
    for name in ("golden_mrr", "vectors_valid", "index_recall"):
        assert not said[name].passed
        assert not said[name].evaluated
        assert said[name].severity == "WARN"
        assert "not evaluated" in said[name].words


def test_a_database_that_is_away_is_not_a_pass(
    complete: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", complete.database.replace("test_", "no_such_"))
    load_settings.cache_clear()
    for said in complete.nightly().values():
        assert (said.passed, said.severity, said.evaluated) == (False, "WARN", False)


def test_an_old_evaluation_does_not_judge_new_vectors(
    complete: Project, connection: Connection
) -> None:
    unchanged = complete.embed("a", "c")
    assert all(found.passed for found in unchanged.values()), "nothing was written since"

    connection.execute("UPDATE docs SET body = 'edited' WHERE id = 30")
    said = complete.embed()
    assert said["coverage"].passed
    for name in ("golden_mrr", "index_recall"):
        assert (said[name].passed, said[name].evaluated) == (False, False)
        assert said[name].severity == "WARN"


# ---- calm -------------------------------------------------------------------------------------


def test_a_limited_run_is_a_warning_however_old_the_column_is(
    project: Project, connection: Connection
) -> None:
    assert project.pending()
    project.nightly("coverage")
    since(connection, 24)

    said = project.embed(config={"limit": 20}, checks=("coverage",))["coverage"]

    assert (said.passed, said.severity) == (False, "WARN")
    assert "limited" in said.words
    assert sum(project.pending().values()) == 40


def test_the_first_of_many_tenants_is_a_warning(project: Project, connection: Connection) -> None:
    project.nightly("coverage")
    since(connection, 24)

    said = project.embed("a", checks=("coverage",))["coverage"]

    assert (said.passed, said.severity) == (False, "WARN")
    assert project.nightly("coverage")["coverage"].severity == "ERROR", "but not by itself"


def test_a_live_writers_rows_are_a_warning(complete: Project, connection: Connection) -> None:
    connection.execute("INSERT INTO docs (id, body, tenant) VALUES (100, 'just now', 'a')")
    assert complete.nightly("coverage")["coverage"].severity == "WARN"


def test_between_two_runs_of_a_backfill_nobody_is_alarmed(
    complete: Project, connection: Connection
) -> None:
    connection.execute("UPDATE docs SET body = 'edited ' || id WHERE tenant IN ('a', 'b')")
    complete.nightly("coverage")
    since(connection, 24)
    complete.embed("a", checks=())
    assert complete.nightly("coverage")["coverage"].severity == "ERROR"

    complete.instance.create_run_for_job(
        complete.job,
        tags={names.TABLE_TAG: "docs", names.COLUMN_TAG: "embedding_4"},
        status=dg.DagsterRunStatus.NOT_STARTED,
    )
    said = complete.nightly("coverage")["coverage"]
    assert said.severity == "WARN"
    assert "at work" in said.words
    connection.execute(
        "UPDATE embedding_pipeline.embedding_column SET written_at = now() - interval '1 h'"
    )
    said = complete.nightly("coverage")["coverage"]
    assert said.severity == "ERROR", "a queue that nobody works off explains nothing"


def test_an_empty_table_has_nothing_to_evaluate_and_no_run_fails(
    project: Project, connection: Connection
) -> None:
    connection.execute("TRUNCATE docs")
    said = project.run(project.index, project.quality)
    for name in ("golden_mrr", "vectors_valid", "index_recall"):
        assert (said[name].passed, said[name].severity, said[name].evaluated) == (
            False,
            "WARN",
            False,
        )
    event = project.instance.get_latest_materialization_event(project.quality)
    assert event is not None
    assert event.asset_materialization is not None
    report = event.asset_materialization.metadata["report"].value
    assert "not evaluated: docs.embedding_4 has no embedded rows yet" in str(report)


def test_a_table_that_is_never_seen_complete_but_whose_rows_never_wait_is_calm(
    complete: Project, connection: Connection
) -> None:
    """A writer that adds rows all day: each is embedded within seconds, and always one is not."""

    def write(number: int) -> None:
        connection.execute(
            "INSERT INTO docs (id, body, tenant) VALUES ($1, 'row ' || $1, 'a')", [number]
        )

    for number in range(100, 105):
        write(number)
    complete.nightly("coverage")
    since(connection, 24)
    assert complete.nightly("coverage")["coverage"].severity == "ERROR"
    complete.server.rule = lambda *_: write(complete.server.count.requests + 1000)
    complete.embed("a", config={"limit": 2}, checks=())
    assert complete.nightly("coverage")["coverage"].severity == "ERROR", "it did not reach the end"

    complete.embed("a", checks=())
    assert complete.pending()
    said = complete.nightly("coverage")["coverage"]
    assert said.severity == "WARN"
    assert "for less than 60 minutes" in said.words

    connection.execute("UPDATE embedding_pipeline.lease SET emptied_at = now() - interval '2 h'")
    assert complete.nightly("coverage")["coverage"].severity == "ERROR", "nobody came for a day"


def test_rows_that_a_running_backfill_holds_are_a_warning(
    complete: Project, connection: Connection
) -> None:
    connection.execute("UPDATE docs SET body = 'edited' WHERE tenant = 'a'")
    complete.nightly("coverage")
    since(connection, 24)
    with Lease(complete.database, complete.column, ["b"], "run-1") as lease:
        lease.acquire()
        assert complete.nightly("coverage")["coverage"].severity == "ERROR", "not its partition"
    with Lease(complete.database, complete.column, ["a"], "run-1") as lease:
        lease.acquire()
        said = complete.nightly("coverage")["coverage"]
    assert said.severity == "WARN"
    assert "at work" in said.words


# ---- costs ------------------------------------------------------------------------------------


def await_other_sessions(connection: Connection) -> None:
    """Until the sessions that others had in this database have ended."""
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + 60
    while connection.execute(others).fetchone() != (0,):
        assert time.monotonic() < deadline, "a session was left open"
        time.sleep(0.02)


def test_in_an_embedding_run_a_large_table_is_not_scanned(
    complete: Project, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "COUNTED_ROWS", 1000)
    monkeypatch.setattr(subject, "SAMPLED_ROWS", 1000)
    sampled = 2000
    monkeypatch.setattr(subject, "SAMPLED_KEYS", sampled)
    # nor by the asset itself, which has its own limit
    monkeypatch.setattr("embedding_pipeline.components.table_metadata.COUNTED_ROWS", 1000)
    connection.execute(
        "INSERT INTO docs (id, body, tenant) SELECT i, 'row ' || i, 'a'"
        " FROM generate_series(1001, 21000) AS i"
    )
    pretend_filled(connection, complete.column)
    connection.execute("VACUUM ANALYZE docs")
    connection.execute("UPDATE docs SET body = 'edited' WHERE id = 1001")
    complete.run(checks=("coverage",))
    await_other_sessions(connection)  # one reports its reads when it ends, after its client went
    connection.execute("SELECT pg_stat_reset()")

    said = complete.embed("a", "b")

    assert said["coverage"].passed
    assert not said["vectors_valid"].passed, "all of them alike"
    assert (
        "sampled" in said["vectors_valid"].words or "share a vector" in said["vectors_valid"].words
    )
    connection.execute("SELECT pg_stat_force_next_flush()")
    row = connection.execute(
        "SELECT coalesce(sum(seq_tup_read), 0) FROM pg_stat_user_tables WHERE relname = 'docs'"
    ).fetchone()
    assert row is not None
    # how many rows the sampled pages hold is chance, and the query stops at the sample's size
    assert 0 < row[0] <= 2 * sampled, "a sample, not the 20,000 rows"
