"""Ways to break things: what is told, once, and what is told when it is mended.

`e2e/test_alerts.py` breaks a running project; here the alert sensor is evaluated tick by tick, at
a real Dagster instance, database, provider and channel, so that "not yet" and "not twice" can be
looked at.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from embedding_pipeline.embedders import endpoints
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.pauses import pause, resume
from embedding_pipeline_tests.alerts.receiver import Received
from embedding_pipeline_tests.alerts.world import World
from embedding_pipeline_tests.faults.server import Status

COLUMN = "docs.embedding_4"


def told(world: World, title: str, ticks: int) -> Received:
    """The one alert of an incident, which comes with this tick and not before; no second one."""
    for number in range(1, ticks):
        assert world.tick() == [], f"told too early, at tick {number}"
    alerts = world.tick()
    assert [each.title for each in alerts] == [f"[ALERT] {title}"]
    assert world.tick(2) == [], "one alert for an incident"
    return alerts[0]


def over(world: World, title: str, ticks: int) -> Received:
    """The same for the message that it is over."""
    for number in range(1, ticks):
        assert world.tick() == [], f"told too early, at tick {number}"
    messages = world.tick()
    assert [each.title for each in messages] == [f"[RECOVERED] {title}"]
    assert world.tick(2) == [], "one message when it is over"
    return messages[0]


def rows_wait(world: World, minutes: int = 2) -> None:
    """Some rows are edited, and that was so many minutes ago."""
    world.sql("UPDATE docs SET body = body || ' (edited)' WHERE tenant = 'a'")
    waited(world, minutes)


def waited(world: World, minutes: int) -> None:
    """The rows that are pending have been so for so many minutes, and no run since."""
    world.tick()
    world.sql(
        "UPDATE embedding_pipeline.embedding_column SET written_at = NULL,"
        f" pending_since = now() - interval '{minutes} min'"
    )
    world.sql("UPDATE embedding_pipeline.lease SET emptied_at = NULL")


# ---- providers --------------------------------------------------------------------------------


def test_provider_down(world: World) -> None:
    rows_wait(world)
    world.server.stop()
    alert = told(world, "provider tei", ticks=2)
    assert alert.line("value") == f"15 rows wait in {COLUMN}"
    assert "Provider tei is down" in alert.body

    world.server.start()
    over(world, "provider tei", ticks=2)


def test_a_provider_that_hiccups_is_no_news(world: World) -> None:
    rows_wait(world)
    world.server.script(Status(503))
    assert world.tick(3) == []
    assert world.incidents() == []


def test_a_provider_that_is_busy_is_not_down(world: World) -> None:
    rows_wait(world)
    world.server.rule = lambda _, __: Status(429)
    assert world.tick(4) == []


def test_nobody_asks_a_provider_that_nobody_waits_for(world: World) -> None:
    before = world.server.count.requests
    world.tick(3)
    assert world.server.count.requests == before


def test_wrong_key(world: World) -> None:
    rows_wait(world)
    world.server.api_key = "another key"
    alert = told(world, "provider tei", ticks=1)
    assert "Provider tei refuses us" in alert.body
    assert "Incorrect API key" in alert.body

    world.server.api_key = None
    over(world, "provider tei", ticks=1)


@pytest.fixture
def vendor(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The column's provider speaks OpenAI's dialect, has a price and a daily cap."""
    entry = {
        "dialect": "openai",
        "address": world.server.openai_url,
        "price_per_million_tokens": {"test-model-4": 1000.0},
        "daily_cost_cap": 0.05,
    }
    file = tmp_path / "providers.yaml"
    file.write_text(json.dumps({"providers": {"vendor": entry}}))
    monkeypatch.setattr(endpoints, "PROVIDERS_FILE", file)
    change(world, provider="vendor")
    return world


def change(world: World, **changes: Any) -> None:
    """The column's YAML says something else, and the definitions are loaded anew."""
    table = world.file.spec
    embedding = table.embeddings[0].model_copy(update=changes)
    world.file = TableFile(table.model_copy(update={"embeddings": [embedding]}), world.file.path)
    with connect(world.url) as connection:
        world.column = bind_columns(connection, world.file.spec)[0]
    world.load()


def test_quota_reached(vendor: World) -> None:
    rows_wait(vendor)
    words = "You exceeded your current quota"
    vendor.server.rule = lambda _, __: Status(429, words=words, code="insufficient_quota")
    alert = told(vendor, "provider vendor", ticks=1)
    assert words in alert.body

    vendor.server.rule = None
    over(vendor, "provider vendor", ticks=1)


def test_daily_cost_cap_reached(vendor: World, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor.sql("UPDATE docs SET body = body || ' edited'")
    assert vendor.embed().success, "it stops at the cap, cleanly"
    assert vendor.pending()
    alert = told(vendor, "cost cap vendor", ticks=1)
    assert alert.line("threshold") == "$0.05 a day"
    assert alert.line("value").startswith("$0.0")
    waited(vendor, 200)
    assert vendor.tick(3) == [], "rows that wait for the new day are no second incident"

    vendor.sql("UPDATE embedding_pipeline.daily_spending SET day = day - 1")  # midnight
    [recovery] = vendor.tick()
    assert recovery.title == "[RECOVERED] cost cap vendor"
    assert vendor.tick(3) == [], "they are being caught up"


# ---- vectors, indexes, rows -------------------------------------------------------------------


def test_index_dropped(world: World) -> None:
    world.sql(f'DROP INDEX "{world.column.hnsw_index}"')
    title = f"check {COLUMN}: index_recall"
    alert = told(world, title, ticks=2)
    assert "has no HNSW index" in alert.body

    assert world.run(world.index).success
    over(world, title, ticks=2)


def test_index_invalid(world: World) -> None:
    world.sql(
        "UPDATE pg_index SET indisvalid = false"
        f" WHERE indexrelid = '\"{world.column.hnsw_index}\"'::regclass"
    )
    title = f"check {COLUMN}: index_recall"
    alert = told(world, title, ticks=2)
    assert "is not valid" in alert.body

    assert world.run(world.index).success
    over(world, title, ticks=2)


def test_vectors_shuffled(world: World) -> None:
    world.sql(
        "UPDATE docs SET embedding_4 = other.embedding_4 FROM docs AS other"
        " WHERE other.id = 1 + (docs.id + 30) % 60"
    )
    assert world.evaluate().success
    title = f"check {COLUMN}: golden_mrr"
    alert = told(world, title, ticks=1)
    assert alert.line("threshold") == "0.3"
    assert alert.line("value").startswith("MRR@5 0")

    world.sql("UPDATE docs SET embedding_4 = NULL")
    assert world.embed().success
    assert world.tick() == [], "embedded, but nobody has judged the new vectors yet"
    assert world.evaluate().success
    over(world, title, ticks=1)


def test_zero_vector(world: World) -> None:
    world.sql("UPDATE docs SET embedding_4 = '[0,0,0,0]' WHERE id = 30")
    world.check("vectors_valid")
    title = f"check {COLUMN}: vectors_valid"
    assert told(world, title, ticks=1).line("value") == "1 zero vectors of 60"

    world.sql("UPDATE docs SET embedding_4 = NULL WHERE id = 30")
    world.embed()
    world.check("vectors_valid")
    over(world, title, ticks=1)


def test_a_column_nulled_by_hand_heals_by_itself(world: World) -> None:
    """Every row is pending then, and the table's sensor embeds it: nothing to tell."""
    world.sql("UPDATE docs SET embedding_4 = NULL")
    assert world.tick() == []
    assert world.embed().success
    assert world.tick(2) == []
    assert world.incidents() == []


def test_stale_rows_older_than_max_pending_minutes(world: World) -> None:
    rows_wait(world, minutes=75)
    title = f"check {COLUMN}: coverage"
    alert = told(world, title, ticks=1)
    assert alert.line("value") == "pending for 75 minutes"
    assert alert.line("threshold") == "60 minutes"

    assert world.embed().success
    over(world, title, ticks=1)


def test_rows_of_a_paused_table_wait_because_somebody_wants_it_so(world: World) -> None:
    with connect(world.url) as connection:
        pause(connection, world.column.facts, None, by="a test")
        rows_wait(world, minutes=75)
        world.server.stop()
        assert world.tick(3) == [], "nor is a provider asked for them"
        world.server.start()
        resume(connection, world.column.facts, None)
    told(world, f"check {COLUMN}: coverage", ticks=1)


def test_a_table_that_is_written_to_all_the_time_never_alerts(world: World) -> None:
    """At every look some row is pending; none has been for long."""
    world.sql("UPDATE docs SET body = 'edited'")
    assert world.embed().success
    world.sql("UPDATE docs SET body = 'just now' WHERE id = 4")
    world.tick()
    world.sql(
        "UPDATE embedding_pipeline.embedding_column SET pending_since = now() - interval '75 min'"
    )
    assert world.tick(4) == []


def test_quarantine_past_its_share(world: World) -> None:
    """The run stops; that is the same incident."""
    change(world, max_quarantined_share=0.01)
    world.sql("UPDATE docs SET body = 'refused ' || id WHERE id > 25")
    world.server.poison = {
        f"refused {n}": Status(400, words="content filter") for n in range(26, 61)
    }
    assert not world.embed().success
    alert = told(world, f"quarantine {COLUMN}", ticks=1)
    assert "retry docs embedding_4 --list" in alert.body

    world.server.poison = {}
    world.sql("UPDATE embedding_pipeline.quarantined_row SET released_at = now()")
    assert world.embed().success
    over(world, f"quarantine {COLUMN}", ticks=1)


# ---- golden sets ------------------------------------------------------------------------------


def test_golden_rows_deleted(world: World) -> None:
    """One of twenty: the others still judge. Most of them: nobody judges any more."""
    world.sql("DELETE FROM docs WHERE id = 1")
    assert world.evaluate().success
    assert world.tick(2) == []

    world.sql("DELETE FROM docs WHERE id < 15")
    assert world.evaluate().success
    title = f"check {COLUMN}: golden_mrr"
    alert = told(world, title, ticks=1)
    assert "bring the golden set up to date" in alert.body

    lines = [{"query": f"text number {n}", "expected": [n]} for n in range(20, 40)]
    golden = world.file.golden_set_path
    assert golden is not None
    golden.write_text("\n".join(map(json.dumps, lines)))
    assert world.evaluate().success
    over(world, title, ticks=1)


def test_golden_set_file_broken(world: World) -> None:
    golden = world.file.golden_set_path
    assert golden is not None
    whole = golden.read_text()
    golden.write_text(whole + '\n{"query": ')
    assert not world.evaluate().success
    title = "run docs: indexes, evaluation"
    alert = told(world, title, ticks=1)
    assert "golden_set.jsonl" in alert.body

    golden.write_text(whole)
    assert world.evaluate().success
    over(world, title, ticks=1)


# ---- definitions and tables -------------------------------------------------------------------


def test_recipe_changed_in_yaml(world: World) -> None:
    before = world.file
    change(world, model="another-model")
    alert = told(world, "column docs", ticks=2)
    assert alert.line("column") == "embedding_4"
    assert "another-model" in alert.body

    world.file = before
    world.load()
    over(world, "column docs", ticks=2)


def test_table_renamed(world: World) -> None:
    """Its sensor's ticks fail too: one incident."""
    world.sql("ALTER TABLE docs RENAME TO documents")
    world.instigate("docs_pending", "FAILURE", 3)
    told(world, "column docs", ticks=2)

    world.sql("ALTER TABLE documents RENAME TO docs")
    world.instigate("docs_pending", "SKIPPED", 1)
    over(world, "column docs", ticks=2)


# ---- sensors and schedules --------------------------------------------------------------------


def test_sensor_stopped(world: World) -> None:
    world.instigate("docs_pending", "SKIPPED", 1)
    assert world.tick() == []
    world.instigate("docs_pending", "SKIPPED", 0, running=False)
    alert = told(world, "sensor docs_pending", ticks=1)
    assert alert.line("table") == "docs"
    assert alert.line("link").endswith("/locations/embedding_pipeline/sensors/docs_pending")
    rows_wait(world, minutes=75)
    assert world.tick(2) == [], "that rows wait follows from it"

    world.instigate("docs_pending", "SKIPPED", 1)
    over(world, "sensor docs_pending", ticks=1)


def test_sensor_that_no_longer_ticks(world: World) -> None:
    world.instigate("docs_pending", "SKIPPED", 1, seconds_ago=400)
    alert = told(world, "sensor docs_pending", ticks=4)
    assert "has stopped ticking: no tick for" in alert.body

    world.instigate("docs_pending", "SKIPPED", 1)
    over(world, "sensor docs_pending", ticks=4)


def test_sensor_whose_ticks_fail(world: World) -> None:
    world.instigate("docs_pending", "FAILURE", 2)
    assert world.tick(3) == [], "two may pass"
    world.instigate("docs_pending", "FAILURE", 1)
    alert = told(world, "sensor docs_pending", ticks=1)
    assert "scripted failure" in alert.body

    world.instigate("docs_pending", "SKIPPED", 1)
    over(world, "sensor docs_pending", ticks=1)


def test_a_sensor_that_was_never_on_is_not_missed(world: World) -> None:
    """Plain `dagster dev`: sensors are off until somebody switches them on."""
    assert world.tick(6) == []


SCHEDULE = "nightly_test"


@pytest.fixture
def scheduled(world: World) -> World:
    """A schedule that was due a quarter of an hour ago."""
    due = datetime.now(UTC) - timedelta(minutes=15)

    @dg.schedule(
        cron_schedule=f"{due.minute} {due.hour} * * *", job_name="__ASSET_JOB", name=SCHEDULE
    )
    def nightly() -> dg.SkipReason:
        return dg.SkipReason("a test's")

    world.extra = dg.Definitions(schedules=[nightly])
    world.load()
    return world


def test_schedule_stopped(scheduled: World) -> None:
    scheduled.instigate(SCHEDULE, "SKIPPED", 1)
    assert scheduled.tick() == []
    scheduled.instigate(SCHEDULE, "SKIPPED", 0, running=False)
    told(scheduled, f"schedule {SCHEDULE}", ticks=1)

    scheduled.instigate(SCHEDULE, "SKIPPED", 1)
    over(scheduled, f"schedule {SCHEDULE}", ticks=1)


def test_schedule_that_missed_its_time(scheduled: World) -> None:
    scheduled.instigate(SCHEDULE, "SKIPPED", 1, seconds_ago=86_400)
    alert = told(scheduled, f"schedule {SCHEDULE}", ticks=4)
    assert "was due" in alert.body

    scheduled.instigate(SCHEDULE, "SKIPPED", 1)
    over(scheduled, f"schedule {SCHEDULE}", ticks=4)
