"""What becomes of an alert that does not arrive: it is seen, it is kept, it is sent again."""

import dagster as dg
import pytest

from embedding_pipeline.alerts import delivery, tick
from embedding_pipeline.alerts.channels import Channel
from embedding_pipeline_tests.alerts.conftest import SECRET
from embedding_pipeline_tests.alerts.receiver import Receiver
from embedding_pipeline_tests.alerts.world import World
from embedding_pipeline_tests.project import set_variables

ALERT = "[ALERT] check docs.embedding_4: vectors_valid"
RECOVERED = "[RECOVERED] check docs.embedding_4: vectors_valid"


def break_it(world: World) -> None:
    world.sql("UPDATE docs SET embedding_4 = '[0,0,0,0]' WHERE id = 30")
    world.check("vectors_valid")


def mend_it(world: World) -> None:
    world.sql("UPDATE docs SET embedding_4 = NULL WHERE id = 30")
    world.embed()
    world.check("vectors_valid")


def test_an_undelivered_alert_fails_the_tick_and_is_sent_again_with_back_off(
    world: World, receiver: Receiver
) -> None:
    receiver.refusing = True
    break_it(world)
    assert world.tick() == []
    assert receiver.refused == 1
    [failed] = world.failed
    assert failed.startswith("not delivered yet: 1 json: 1 undelivered since ")
    world.tick(3)
    assert receiver.refused == 1, "not before its back-off is over"
    assert world.failed, "visible for as long as it lasts"

    world.back_off_is_over()
    world.tick()
    assert receiver.refused == 2
    [(first, second)] = world.sql(
        "SELECT attempts, round(extract(epoch FROM not_before - now()))::int"
        " FROM embedding_pipeline.alert_message WHERE event = 'alert' AND title LIKE '%valid'"
    )
    assert first == 2
    assert second > 40, "twice as long as before"

    receiver.refusing = False
    world.back_off_is_over()
    assert [each.title for each in world.tick()] == [ALERT]
    assert world.failed == []


def test_the_real_tick_of_the_sensor_is_red(world: World, receiver: Receiver) -> None:
    """What a person sees in the UI."""
    definition = world.definitions.get_sensor_def("alerts")
    context = dg.build_sensor_context(world.instance, repository_def=world.repository)
    calm = definition(context)
    assert isinstance(calm, dg.SkipReason)
    assert calm.skip_message is not None
    assert calm.skip_message.startswith("0 incidents open")

    receiver.refusing = True
    break_it(world)
    with pytest.raises(dg.Failure, match="not delivered yet: 1 json"):
        definition(dg.build_sensor_context(world.instance, repository_def=world.repository))


def test_a_recovery_never_overtakes_its_alert(world: World, receiver: Receiver) -> None:
    receiver.refusing = True
    break_it(world)
    world.tick()
    mend_it(world)
    world.tick()
    receiver.refusing = False
    world.back_off_is_over()
    assert [each.title for each in world.tick()] == [ALERT, RECOVERED]


def test_a_dead_channel_is_told_to_the_others(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver() as other:
        set_variables(monkeypatch, ALERT_URLS=f"{receiver.url()}, {other.url()}")
        receiver.refusing = True
        break_it(world)
        world.tick()
        assert other.titles() == [ALERT]
        world.back_off_is_over()
        world.tick(3)
        assert other.titles() == [ALERT, "[ALERT] alert channel 1 json"]
        assert "undelivered" in other.messages[-1].line("value")

        receiver.refusing = False
        world.back_off_is_over()
        world.tick(4)
        assert receiver.titles() == [ALERT], "once, and nothing of itself"
        assert other.titles()[2:] == ["[RECOVERED] alert channel 1 json"]


class DiedError(BaseException):
    """The process is gone."""


def test_a_crash_before_sending_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(world)

    def die(*_: object) -> int:
        raise DiedError

    with monkeypatch.context() as crash:
        crash.setattr(tick, "deliver", die)
        with pytest.raises(DiedError):
            world.tick()
    assert [each.title for each in world.tick(3)] == [ALERT]


def test_a_crash_between_sending_and_noting_it_sends_it_twice_at_most(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: the alternative is to lose it."""
    break_it(world)
    send = Channel.send

    def send_and_die(self: Channel, title: str, body: str, *, recovery: bool = False) -> None:
        send(self, title, body, recovery=recovery)
        raise DiedError

    with monkeypatch.context() as crash:
        crash.setattr(Channel, "send", send_and_die)
        with pytest.raises(DiedError):
            world.tick()
    world.tick(3)
    assert receiver.titles() == [ALERT, ALERT]


def test_a_message_is_given_up_after_a_week(world: World, receiver: Receiver) -> None:
    receiver.refusing = True
    break_it(world)
    world.tick()
    world.sql("UPDATE embedding_pipeline.alert_message SET created_at = now() - interval '8 days'")
    world.back_off_is_over()
    world.tick()
    assert delivery.GIVE_UP_DAYS == 7
    receiver.refusing = False
    world.back_off_is_over()
    assert world.tick() == []
    assert world.failed == []


def test_without_channels_incidents_are_kept_and_told_when_there_is_one(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, ALERT_URLS=" ")
    break_it(world)
    world.tick()
    assert "ALERT_URLS is not set: nobody is told" in world.said
    set_variables(monkeypatch, ALERT_URLS=receiver.url())
    assert [each.title for each in world.tick(2)] == [ALERT]


def test_a_channel_that_is_no_longer_configured_is_not_waited_for(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.refusing = True
    break_it(world)
    world.tick()
    assert world.failed
    set_variables(monkeypatch, ALERT_URLS=f"jsons://127.0.0.1:{receiver.port}")
    world.tick()
    assert not any("1 json:" in line for line in world.failed)


def test_an_entry_that_apprise_does_not_understand_is_named_and_the_others_are_told(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, ALERT_URLS=f"slack://{SECRET} {receiver.url()}")
    break_it(world)
    assert [each.title for each in world.tick()] == [ALERT]
    assert world.failed == ["ALERT_URLS: apprise does not understand entry 1 slack"]


# ---- the database is away ---------------------------------------------------------------------


def test_a_database_that_restarts_is_no_news(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    away(world, monkeypatch)
    assert world.tick(2) == []
    set_variables(monkeypatch, DATABASE_URL=world.url)
    assert world.tick(2) == []


def test_a_database_that_stays_away_is_told_and_that_it_is_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its incidents cannot be in it: the sensor's cursor keeps this one."""
    away(world, monkeypatch)
    assert world.tick(2) == []
    [alert] = world.tick()
    assert alert.title == "[ALERT] database source tables"
    assert world.tick(3) == []
    set_variables(monkeypatch, DATABASE_URL=world.url)
    [recovery] = world.tick()
    assert recovery.title == "[RECOVERED] database source tables"
    assert world.tick(2) == []
    assert world.cursor is None


def away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, DATABASE_URL="postgresql://nobody@127.0.0.1:9/none")
