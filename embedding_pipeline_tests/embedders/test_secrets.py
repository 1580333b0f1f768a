"""No key in anything that is shown, logged, raised or stored."""

import asyncio
import logging
import pickle
import traceback

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

KEY = "sk-proj-VERYsecret1234567890abcdef"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "fault",
    [
        Status(401, words=f"Incorrect API key provided: {KEY}. Find yours at …"),
        Status(400, words=f"bad request by {KEY}"),
        Status(500, words=KEY),
        Status(307, {"location": f"http://elsewhere/?key={KEY}"}),
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
    shown: list[str] = []

    async def main() -> None:
        endpoint = endpoint_of(
            server, dialect, api_key=SecretStr(KEY + "\n"), concurrency=1, give_up_after_seconds=2.0
        )
        embedder = embedder_of(endpoint, server)
        shown.extend([repr(embedder), repr(endpoint), repr(vars(embedder))])
        try:
            result = await embedder.embed(texts(40))
            shown.append(repr(result))
        except EmbedError as error:
            shown.extend(["".join(traceback.format_exception(error)), repr(error), str(error)])
            shown.append(repr(error.partial))
        await embedder.aclose()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert server.count.authorizations == {f"Bearer {KEY}"}
    shown.extend([caplog.text, *capfd.readouterr()])
    everything = "\n".join(shown)
    assert "test-" in everything
    assert KEY not in everything
    assert "VERYsecret" not in everything


def test_credentials_in_an_address_are_not_shown() -> None:
    endpoint = Endpoint("x", "tei", "https://user:hunter2@host:8080/tei?token=abc")
    assert endpoint.address == "https://host:8080/tei"
    assert "hunter2" not in repr(endpoint)
    assert "abc" not in repr(endpoint)


@given(st.text(max_size=3000), st.text(st.characters(codec="ascii"), min_size=8, max_size=60))
def test_words_are_short_printable_storable_and_without_the_key(text: str, key: str) -> None:
    words = provider_words(f"{text}{key}{text}", SecretStr(key))
    assert len(words) <= MAX_WORDS
    assert "\n" not in words
    assert "\x00" not in words
    words.encode()  # no lone surrogates: Postgres refuses them
    if key.strip() and key.strip() not in f"{text}[key]{text}":
        assert key.strip() not in words


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
