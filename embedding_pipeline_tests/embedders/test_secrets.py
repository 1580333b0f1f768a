"""No key in anything that is shown, logged, raised or stored."""

import asyncio
import logging
import pickle
import traceback
from base64 import b64encode
from dataclasses import replace
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from embedding_pipeline.embedders import EmbedError, Endpoint
from embedding_pipeline.embedders.errors import MAX_WORDS, provider_words
from embedding_pipeline_tests.embedders.support import (
    DIALECTS,
    Dialect,
    embedder_of,
    endpoint_of,
    texts,
)
from embedding_pipeline_tests.faults.server import FaultServer, HalfResponse, Status

KEY = "the.providers.KEY-VERYsecret1234567890abcdef"
"""Of no known shape, so that only the code that knows it can keep it out of sight."""
PASSWORD = "the/VERYsecret:password"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "fault",
    [
        Status(401, words=f"Incorrect API key provided: {KEY}. Find yours at …"),
        Status(400, words=f"bad request by {KEY}"),
        Status(500, words=KEY),
        Status(307, {"location": f"http://elsewhere/{KEY}"}),
        Status(307, {"location": f"http://elsewhere/?key={KEY}"}),
        Status(307, {"location": f"http://[{KEY}"}),
        HalfResponse(),
    ],
    ids=repr,
)
def test_a_key_that_the_provider_quotes_goes_no_further(
    server: FaultServer,
    dialect: Dialect,
    fault: Status,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """OpenAI's 401 quotes the key; it ended up in a run's event log, in the alert's message and in
    the quarantine table."""
    server.api_key = KEY
    server.rule = lambda number, inputs: fault if number else None
    endpoint = endpoint_of(
        server, dialect, api_key=SecretStr(KEY + "\n"), concurrency=1, give_up_after_seconds=2.0
    )

    with caplog.at_level(logging.DEBUG):
        shown = said_about(server, endpoint)

    assert server.count.authorizations == {f"Bearer {KEY}"}
    everything = "\n".join([shown, caplog.text, *capfd.readouterr()])
    assert "test-" in everything
    assert "VERYsecret" not in everything


def said_about(server: FaultServer, endpoint: Endpoint) -> str:
    """All that an embedder of the endpoint shows when it embeds 40 texts."""
    shown: list[str] = []

    async def main() -> None:
        embedder = embedder_of(endpoint, server)
        shown.extend([repr(embedder), repr(endpoint), repr(vars(embedder))])
        try:
            result = await embedder.embed(texts(40))
            shown.append(repr(result))
        except EmbedError as error:
            shown.extend(["".join(traceback.format_exception(error)), repr(error), str(error)])
            shown.append(repr(error.partial))
        await embedder.aclose()

    asyncio.run(main())
    return "\n".join(shown)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "fault",
    [
        None,
        Status(401, words=f"who is me:{PASSWORD}?"),
        Status(307, {"location": f"http://me:{PASSWORD}@elsewhere/"}),
        Status(500, words=b64encode(f"me:{PASSWORD}".encode()).decode()),
        HalfResponse(),
    ],
    ids=repr,
)
def test_user_and_password_of_an_address_are_sent_and_not_shown(
    server: FaultServer,
    dialect: Dialect,
    fault: Status,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A TEI server behind a proxy that asks for a password: OPENAI_BASE_URL with one in it ended
    every run with a bare ValueError, and HTTP clients log the address that they are given."""
    server.rule = lambda number, inputs: fault if number else None
    endpoint = endpoint_of(server, dialect, concurrency=1, give_up_after_seconds=2.0)
    address = endpoint.base_url.replace("://", f"://me:{quote(PASSWORD, safe='')}@")

    with caplog.at_level(logging.DEBUG):
        shown = said_about(server, replace(endpoint, base_url=address))

    basic = b64encode(f"me:{PASSWORD}".encode()).decode()
    assert server.count.authorizations == {f"Basic {basic}"}
    everything = "\n".join([shown, caplog.text, *capfd.readouterr()])
    assert "test-" in everything
    assert "VERYsecret" not in everything
    assert basic not in everything


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_address_with_a_password_beside_a_key_is_refused(
    server: FaultServer, dialect: Dialect
) -> None:
    """Both go into the same header, so one of them would silently not be sent."""
    endpoint = endpoint_of(server, dialect, api_key=SecretStr(KEY))
    address = endpoint.base_url.replace("://", "://me:VERYsecret@")

    said = said_about(server, replace(endpoint, base_url=address))

    assert f"test-{dialect} cannot be used" in said
    assert "Unset the key, or take them out of the address" in said
    assert "VERYsecret" not in said
    assert server.count.requests == server.count.info == 0


def test_credentials_in_an_address_are_not_shown() -> None:
    endpoint = Endpoint("x", "tei", "https://user:hunter2@host:8080/tei?token=abc")
    assert endpoint.address == "https://host:8080/tei"
    assert "hunter2" not in repr(endpoint)
    assert "abc" not in repr(endpoint)


@given(st.text(max_size=3000), st.text(st.characters(codec="ascii"), min_size=8, max_size=60))
def test_words_are_short_printable_storable_and_without_the_key(text: str, key: str) -> None:
    words = provider_words(f"{text}{key}{text}", [key])
    assert len(words) <= MAX_WORDS
    assert "\n" not in words
    assert "\x00" not in words
    words.encode()  # no lone surrogates: Postgres refuses them
    if key not in f"{text}[key]{text}":
        assert key not in words


def test_other_keys_are_redacted_too() -> None:
    quoted = "Incorrect API key provided: sk-abc***************xyz1. And hf_abcdefghijkl."
    assert provider_words(quoted) == "Incorrect API key provided: [key]. And [key]."


def test_errors_survive_pickling() -> None:
    """Dagster hands errors from process to process."""
    from embedding_pipeline.embedders import GlobalError, InputError, TransientError

    for error in (
        TransientError("busy", cause="throttled", retry_after=2.0),
        GlobalError("wrong key"),
        InputError("too long"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
