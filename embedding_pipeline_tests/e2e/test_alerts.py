"""A running project is broken in many ways at once; what its alert channels hear, and when.

Real `dev`, daemon, sensors, runs and ticks. The seconds from breaking to alert and from mending to
recovery are printed (`test-artifacts/alerts.md`), never asserted: an alert sensor that looks every
30 s on a busy machine takes what it takes.
"""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embedding_pipeline.components.sensor import SENSORS_VARIABLE
from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline_tests.alerts.receiver import Receiver
from embedding_pipeline_tests.e2e.project import (
    Project,
    clone,
    discard,
    kill,
    make_project,
    temporary_folder,
    wait_until,
    write_table,
)
from embedding_pipeline_tests.faults.server import Fault, FaultServer, Hang, Status

ROWS = 24
SECRET = "the-channels-PASSWORD"
TEI = {"column": "embedding_8", "dimensions": 8, "provider": "tei", "model": "test-model"}
OPENAI = {
    "column": "embedding_8",
    "dimensions": 8,
    "provider": "openai",
    "model": "text-embedding-3-small",
}
TABLES = (
    *("apples", "dates", "figs", "grapes", "kiwis", "limes"),
    *("melons", "olives", "peaches", "pears", "plums"),
)
PATIENCE = 400.0
"""Seconds: the daemon of a busy machine ticks late."""


@dataclass
class Breakage:
    """One way to break things, and what was heard of it."""

    what: str
    title: str
    """Of its incident, without [ALERT]."""
    broken_at: float = 0.0
    mended_at: float = 0.0


@dataclass
class Broken:
    """A running project, its two channels and its providers."""

    project: Project
    first: Receiver
    second: Receiver
    tei: FaultServer
    openai: FaultServer
    breakages: list[Breakage] = field(default_factory=list)

    def breaks(
        self, what: str, title: str, how: Callable[[], object], since: float | None = None
    ) -> None:
        """Break it now; the clock starts when that begins (or has started, `since`)."""
        self.breakages.append(Breakage(what, title, since or time.monotonic()))
        how()

    def mend(self, title: str, how: Callable[[], object]) -> None:
        """Mend it now; the clock starts when that begins."""
        breakage = next(each for each in self.breakages if each.title == title)
        breakage.mended_at = time.monotonic()
        how()

    def heard(self, prefix: str) -> None:
        """Wait until the first channel has heard this of everything that was broken so far."""
        wanted = {f"[{prefix}] {each.title}" for each in self.breakages}
        wait_until(
            lambda: wanted <= set(self.first.titles()),
            PATIENCE,
            lambda: f"not heard: {wanted - set(self.first.titles())}\nheard: {self.first.titles()}",
        )

    def table(self) -> str:
        """Markdown: what was broken, what was heard, after how many seconds."""
        lines = ["| broken | alert | after | recovery after |", "|---|---|---|---|"]
        for each in self.breakages:
            at = {message.title: message.at for message in self.first.messages}
            alert = at[f"[ALERT] {each.title}"] - each.broken_at
            recovery = at[f"[RECOVERED] {each.title}"] - each.mended_at
            lines.append(f"| {each.what} | `{each.title}` | {alert:.0f} s | {recovery:.0f} s |")
        return "\n".join(lines)

    # ---- hands -------------------------------------------------------------------------------

    def dagster(self, *arguments: str) -> None:
        """Dagster's own command line, in front of the running project."""
        done = subprocess.run(
            [sys.executable, "-m", "dagster", *arguments, "-w", "workspace.yaml"],
            # else the sensors that it sees are off already
            env=self.project.environment | {SENSORS_VARIABLE: "on"},
            cwd=self.project.root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def edit(self, table: str, words: str = "edited") -> None:
        """Half of the rows say something else."""
        self.project.sql(f"UPDATE {table} SET body = body || ' {words}' WHERE id % 2 = 0")

    def look(self, *tables: str) -> None:
        """Indexes, golden sets and every check, as real runs."""
        chosen = [part for table in tables for part in ("--table", table)]
        self.project.run("run", *chosen)

    def pid_of_run(self, table: str) -> int | None:
        rows = self.project.sql(
            "SELECT split_part(holder, ':', 2) FROM embedding_pipeline.lease"
            " WHERE table_name = $1 AND released_at IS NULL AND run_id IS NOT NULL LIMIT 1",
            table,
        )
        return int(rows[0][0]) if rows else None


@pytest.fixture(scope="module")
def broken() -> Iterator[Broken]:
    folder = temporary_folder()
    project = make_project(folder)
    project.root = folder / "clone"
    clone(project.root)
    for shipped in (project.root / "embedding_pipeline" / "defs").iterdir():
        if shipped.is_dir():
            shutil.rmtree(shipped)
    for name in TABLES:
        golden = [{"query": f"{name} number {n}", "expected": [n]} for n in range(1, 13)]
        embedding = OPENAI if name == "olives" else TEI
        write_table(
            folder / "defs",
            name,
            text="body",
            embeddings=[embedding],
            golden=golden,
            partitions={"by": "hash", "buckets": 1},
        )
        project.sql(f"CREATE TABLE {name} (id bigint PRIMARY KEY, body text NOT NULL)")
        project.sql(
            f"INSERT INTO {name} SELECT n, '{name} number ' || n FROM generate_series(1, $1) AS n",
            ROWS,
        )
    try:
        with (
            FaultServer(dimensions=8, model=str(TEI["model"])) as tei,
            FaultServer(dimensions=8, model=str(OPENAI["model"])) as openai,
            Receiver() as first,
            Receiver() as second,
        ):
            project.environment |= {
                "DATABASE_URL": project.url,
                "PYTHONPATH": str(project.root),
                "EMBEDDING_PIPELINE_DEFS": str(folder / "defs"),
                "EMBEDDING_SERVICE_URL": tei.tei_url,
                "OPENAI_API_KEY": "no-secret",
                "OPENAI_BASE_URL": openai.openai_url,
                "EMBEDDING_DAILY_COST_CAP": "0.0005",
                "ALERT_URLS": f"{first.url(SECRET)} {second.url(SECRET)}",
            }
            yield Broken(project, first, second, tei, openai)
    finally:
        discard(project)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_everything_breaks_and_is_told_once(broken: Broken, tmp_path: Path) -> None:
    project, tei, openai = broken.project, broken.tei, broken.openai
    done = project.run("run")
    assert done.code == 0, done.out + done.err
    log = tmp_path / "dev.log"
    project.dev(log=log)
    wait_until(
        lambda: "alerts: last look" in project.run("status", "--table", "figs").out,
        PATIENCE,
        log.read_text,
    )
    assert broken.first.messages == [], "nothing is wrong"

    faults: dict[str, Fault] = {"slow": Hang(), "refused": Status(400, words="content filter")}
    tei.rule = lambda _, texts: next(
        (fault for word, fault in faults.items() if any(word in text for text in texts)), None
    )
    golden = project.folder / "defs" / "grapes" / "golden_set.jsonl"
    whole = golden.read_text()

    # ---- many things at once -----------------------------------------------------------------
    broken.second.refusing = True
    broken.breaks("an alert channel down", "alert channel 2 json", lambda: None)
    broken.breaks(
        "a sensor stopped",
        "sensor pears_pending",
        lambda: broken.dagster("sensor", "stop", "pears_pending"),
    )
    broken.breaks(
        "the schedule stopped",
        "schedule nightly",
        lambda: broken.dagster("schedule", "stop", "nightly"),
    )
    broken.breaks(
        "a table renamed",
        "column plums",
        lambda: project.sql("ALTER TABLE plums RENAME TO damsons"),
    )
    [(index,)] = project.sql("SELECT indexname FROM pg_indexes WHERE indexname LIKE 'figs%hnsw%'")
    broken.breaks(
        "an index dropped",
        "check figs.embedding_8: index_recall",
        lambda: project.sql(f'DROP INDEX "{index}"'),
    )
    broken.breaks(
        "an index invalid",
        "check peaches.embedding_8: index_recall",
        lambda: project.sql(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid ="
            " (SELECT indexname FROM pg_indexes WHERE indexname LIKE 'peaches%hnsw%')::regclass"
        ),
    )
    broken.edit("apples", "slow")
    pid = wait_until(lambda: broken.pid_of_run("apples"), PATIENCE, log.read_text)
    assert pid is not None
    broken.breaks("a run killed (-9)", "run apples: embedding_8", lambda: kill(pid))
    project.sql("INSERT INTO melons SELECT n, 'refused ' || n FROM generate_series(100, 140) AS n")
    broken.breaks("too many rows refused", "quarantine melons.embedding_8", lambda: None)

    # what only a check sees: told when the check has run
    project.sql("UPDATE limes SET embedding_8 = '[0,0,0,0,0,0,0,0]' WHERE id = 3")
    project.sql(
        "UPDATE dates SET embedding_8 = o.embedding_8 FROM dates AS o"
        f" WHERE o.id = 1 + (dates.id + 10) % {ROWS}"
    )
    project.sql("DELETE FROM kiwis WHERE id < 12")
    golden.write_text(whole + '\n{"query": ')
    looked = time.monotonic()
    broken.look("limes", "dates", "kiwis")
    broken.look("grapes")
    for what, title in (
        ("a zero vector", "check limes.embedding_8: vectors_valid"),
        ("vectors shuffled", "check dates.embedding_8: golden_mrr"),
        ("most golden rows deleted", "check kiwis.embedding_8: golden_mrr"),
        ("a golden set file broken", "run grapes: indexes, evaluation"),
    ):
        broken.breaks(f"{what} (from the start of the check's run)", title, lambda: None, looked)
    broken.heard("ALERT")

    # ---- mended ------------------------------------------------------------------------------
    broken.second.refusing = False
    broken.mend("alert channel 2 json", lambda: None)
    faults.clear()
    broken.mend("run apples: embedding_8", lambda: None)
    broken.mend(
        "quarantine melons.embedding_8",
        lambda: project.run("retry", "melons", "embedding_8"),
    )
    broken.mend("sensor pears_pending", lambda: broken.dagster("sensor", "start", "pears_pending"))
    broken.mend("schedule nightly", lambda: broken.dagster("schedule", "start", "nightly"))
    broken.mend("column plums", lambda: project.sql("ALTER TABLE damsons RENAME TO plums"))
    golden.write_text(whole)
    project.sql("UPDATE limes SET embedding_8 = NULL WHERE id = 3")
    project.sql("UPDATE dates SET embedding_8 = NULL")
    project.sql("INSERT INTO kiwis SELECT n, 'kiwis number ' || n FROM generate_series(1, 11) AS n")
    for title in (
        "check figs.embedding_8: index_recall",
        "check peaches.embedding_8: index_recall",
        "check limes.embedding_8: vectors_valid",
        "check dates.embedding_8: golden_mrr",
        "check kiwis.embedding_8: golden_mrr",
        "run grapes: indexes, evaluation",
    ):
        broken.mend(title, lambda: None)
    broken.look("figs", "peaches", "limes", "dates", "kiwis", "grapes")
    broken.heard("RECOVERED")

    # ---- providers and money -----------------------------------------------------------------
    broken.breaks("a provider down", "provider tei", tei.stop)
    broken.edit("figs")
    words = "You exceeded your current quota"
    openai.rule = lambda _, __: Status(429, words=words, code="insufficient_quota")
    broken.breaks("a quota reached", "provider openai", lambda: broken.edit("olives"))
    broken.heard("ALERT")
    broken.mend("provider tei", tei.start)
    openai.rule = None
    broken.mend("provider openai", lambda: None)
    broken.heard("RECOVERED")

    long = "word " * 20_000
    project.sql("INSERT INTO olives SELECT n, $1 || n FROM generate_series(100, 110) AS n", long)
    broken.breaks("the daily cost cap reached", "cost cap all providers", lambda: None)
    broken.heard("ALERT")
    project.sql("DELETE FROM olives WHERE id >= 100")
    broken.mend(
        "cost cap all providers",  # midnight
        lambda: project.sql("UPDATE embedding_pipeline.daily_spending SET day = day - 1"),
    )
    broken.heard("RECOVERED")

    # ---- once each, nothing else, and both channels heard it ---------------------------------
    expected = Counter(
        f"[{event}] {each.title}" for each in broken.breakages for event in ("ALERT", "RECOVERED")
    )
    assert Counter(broken.first.titles()) == expected
    of_itself = {f"[{event}] alert channel 2 json" for event in ("ALERT", "RECOVERED")}
    wait_until(
        lambda: len(broken.second.messages) == len(expected) - len(of_itself),
        PATIENCE,
        broken.second.titles,
    )
    assert Counter(broken.second.titles()) == Counter(
        {title: 1 for title in expected if title not in of_itself}
    )
    status = project.run("status", "--table", "figs").out
    assert "channels: 1 json, 2 json" in status
    assert "open:" not in status
    for text in (status, log.read_text(), json.dumps(broken.first.titles())):
        assert SECRET not in text
    artifacts = PROJECT_ROOT / "test-artifacts"
    artifacts.mkdir(exist_ok=True)
    (artifacts / "alerts.md").write_text(broken.table() + "\n")
    print(broken.table())
