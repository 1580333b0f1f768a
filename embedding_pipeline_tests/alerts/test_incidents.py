"""One alert for an incident, one when it is over, and none is lost or doubled in between."""

from embedding_pipeline_tests.alerts.world import World


def test_a_failed_check_of_a_successful_run_is_told_once_and_once_when_it_is_over(
    world: World,
) -> None:
    """Run failure sensors never see it: the run has succeeded."""
    world.sql("UPDATE docs SET embedding_4 = '[0,0,0,0]' WHERE id IN (30, 31)")
    assert world.check("vectors_valid").success

    [alert] = world.tick()
    assert alert.title == "[ALERT] check docs.embedding_4: vectors_valid"
    assert alert.line("table") == "docs"
    assert alert.line("column") == "embedding_4"
    assert alert.line("check") == "vectors_valid"
    assert alert.line("value") == "2 zero vectors of 60"
    assert alert.line("threshold") == "none"
    assert alert.line("since").endswith("UTC")
    assert "set those vectors to NULL" in alert.line("what to do").replace("Set", "set")
    link = "http://dagster.example:3000/assets/docs/embedding_4?view=checks&checkDetail="
    assert alert.line("link") == f"{link}vectors_valid"

    assert world.tick(3) == [], "once an incident, not once a tick"
    world.check("vectors_valid")
    assert world.tick() == [], "nor once a run"

    world.sql("UPDATE docs SET embedding_4 = NULL WHERE id IN (30, 31)")
    assert world.embed().success
    world.check("vectors_valid")
    [recovery] = world.tick()
    assert recovery.title == "[RECOVERED] check docs.embedding_4: vectors_valid"
    assert recovery.line("recovered").endswith(" s")
    assert world.tick(2) == []


def test_a_warning_never_alerts(world: World) -> None:
    world.sql("INSERT INTO docs (id, body, tenant) VALUES (100, 'just now', 'a')")
    world.check()
    assert world.tick(4) == []
