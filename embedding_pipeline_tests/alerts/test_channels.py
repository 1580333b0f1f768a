"""ALERT_URLS: what is taken, what is refused, and that nobody ever sees it."""

import logging

import pytest
from click.testing import CliRunner

from embedding_pipeline.alerts.channels import Channel, ChannelError, checked, configured
from embedding_pipeline.cli import main
from embedding_pipeline.errors import SettingsError
from embedding_pipeline.settings import load_settings
from embedding_pipeline_tests.alerts.receiver import Receiver
from embedding_pipeline_tests.conftest import Environment

SECRET = "T0-very-secret-Token"


@pytest.mark.parametrize(
    "text",
    [
        "json://a.example/x,mailto://u:p@b.example?to=c@d.example,e@f.example",
        "json://a.example/x mailto://u:p@b.example?to=c@d.example,e@f.example",
        " json://a.example/x ,\n mailto://u:p@b.example?to=c@d.example,e@f.example, ",
    ],
)
def test_addresses_are_separated_by_commas_blanks_or_lines(
    environment: Environment, text: str
) -> None:
    environment(ALERT_URLS=text)
    assert [(channel.name, channel.url) for channel in configured(load_settings())] == [
        ("1 json", "json://a.example/x"),
        ("2 mailto", "mailto://u:p@b.example?to=c@d.example,e@f.example"),
    ]


def test_unset_means_no_channel(environment: Environment) -> None:
    environment(ALERT_URLS="")
    assert configured(load_settings()) == []


@pytest.mark.parametrize("text", [SECRET, f"json://a.example {SECRET}", f"{SECRET},json://a.b"])
def test_an_entry_that_is_no_address_is_refused_at_start_and_not_shown(
    environment: Environment, text: str
) -> None:
    environment(ALERT_URLS=text)
    with pytest.raises(SettingsError, match=r"ALERT_URLS: entry [12] is not an address") as caught:
        load_settings()
    assert SECRET not in str(caught.value)


def test_an_address_that_apprise_does_not_know_is_named_by_place_and_scheme(
    environment: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    environment(ALERT_URLS=f"json://a.example, nosuchservice://{SECRET}, slack://{SECRET}")
    with pytest.raises(SettingsError, match="ALERT_URLS: 2 nosuchservice, 3 slack: not") as caught:
        checked(load_settings())
    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_no_word_of_a_failed_delivery_holds_the_secret(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    channel = Channel("1 json", receiver.url(SECRET))
    receiver.refusing = True
    with pytest.raises(ChannelError) as refused:
        channel.send("title", "body")
    assert "500" in str(refused.value)
    nobody = Channel("2 json", f"json://user:{SECRET}@127.0.0.1:9/{SECRET}")
    with pytest.raises(ChannelError) as unreachable:
        nobody.send("title", "body")
    seen = capfd.readouterr()
    for words in (str(refused.value), str(unreachable.value), repr(channel), caplog.text):
        assert SECRET not in words
    assert SECRET not in seen.out + seen.err


def test_words_of_a_service_that_quote_the_address_are_cut() -> None:
    channel = Channel("1 slack", f"slack://T1JJ3T3L2/A1BRTD4JD/{SECRET}/#alerts")
    assert SECRET not in channel.without_secrets(f"POST /services/T1JJ3T3L2/{SECRET} failed")
    assert channel.without_secrets("Failed: error=404") == "Failed: error=404"
    encoded = Channel("1 json", "json://user:p%40ssw%C3%B6rd@a.example")
    assert "p@sswörd" not in encoded.without_secrets("login user:p@sswörd failed")


def test_the_uis_address_is_one(environment: Environment) -> None:
    environment(DAGSTER_UI_URL="dagster.example:3000")
    with pytest.raises(SettingsError, match="DAGSTER_UI_URL: must start with http"):
        load_settings()


# ---- alert-test -------------------------------------------------------------------------------


def test_alert_test_says_for_each_channel_what_became_of_it(
    environment: Environment, receiver: Receiver
) -> None:
    with Receiver() as broken:
        broken.refusing = True
        urls = (receiver.url(SECRET), broken.url(SECRET), f"slack://{SECRET}")
        environment(ALERT_URLS=", ".join(urls))
        done = CliRunner().invoke(main, ["alert-test"])
    assert done.exit_code == 2
    first, second, third = done.output.splitlines()
    assert first.startswith("1 json: delivered (")
    assert second.startswith("2 json: NOT delivered: ")
    assert third.startswith("3 slack: NOT delivered: apprise does not understand this address")
    assert SECRET not in done.output
    [message] = receiver.messages
    assert message.title == "[TEST] embedding-pipeline alerts"
    assert "Nothing is wrong" in message.body


def test_alert_test_as_json(environment: Environment, receiver: Receiver) -> None:
    environment(ALERT_URLS=receiver.url())
    done = CliRunner().invoke(main, ["alert-test", "--json"])
    assert done.exit_code == 0
    assert '"delivered": true' in done.output


def test_alert_test_without_channels_says_what_to_set(environment: Environment) -> None:
    done = CliRunner().invoke(main, ["alert-test"])
    assert done.exit_code == 2
    assert "ALERT_URLS is not set" in done.output
