"""Who watches the watcher: `status` says when the alert sensor last looked, and what is open."""

from embedding_pipeline.alerts.status import incidents_of, status_lines
from embedding_pipeline.settings import load_settings
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.alerts.receiver import Receiver
from embedding_pipeline_tests.alerts.world import World


def lines(world: World) -> list[str]:
    with connect(world.url) as connection:
        return status_lines(connection, load_settings())


def test_a_sensor_that_looks(world: World) -> None:
    world.tick()
    [line] = lines(world)
    assert line.startswith("alerts: last look ")
    assert line.endswith("; channels: 1 json")
    assert "STOPPED" not in line


def test_a_sensor_that_has_stopped(world: World) -> None:
    world.sql("UPDATE embedding_pipeline.alert_sensor SET ticked_at = now() - interval '5 min'")
    [line] = lines(world)
    assert "THE ALERT SENSOR HAS STOPPED" in line


def test_a_sensor_that_never_ticked(world: World) -> None:
    world.sql("DELETE FROM embedding_pipeline.alert_sensor")
    assert "has never ticked" in lines(world)[0]


def test_open_incidents_and_what_was_not_delivered(world: World, receiver: Receiver) -> None:
    receiver.refusing = True
    world.sql("UPDATE docs SET embedding_4 = '[0,0,0,0]' WHERE id = 30")
    world.check("vectors_valid")
    world.tick()
    _, incident, message = lines(world)
    assert incident.startswith("  open: check docs.embedding_4: vectors_valid since ")
    assert message.startswith("  not delivered: 1 json: 1 undelivered since ")
    with connect(world.url) as connection:
        [row] = incidents_of(connection, "docs.embedding_4")
        assert incidents_of(connection, "docs.another") == []
    assert (row["kind"], row["told"]) == ("check", True)


def test_what_may_pass_is_shown_as_not_told_yet(world: World) -> None:
    world.sql(f'DROP INDEX "{world.column.hnsw_index}"')
    world.tick()
    assert lines(world)[1].endswith("(not told yet: it may pass)")
