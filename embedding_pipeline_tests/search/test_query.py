"""EMBEDDING_MODE: who embeds a table's queries, which column is searched, and who can see it."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from embedding_pipeline.cli import main as command_line
from embedding_pipeline.embedders import TransientError, endpoints
from embedding_pipeline.errors import SettingsError
from embedding_pipeline.search.query import make_query_embedder
from embedding_pipeline.settings import EmbeddingMode, Settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store import endpoint_state
from embedding_pipeline.store.endpoint_state import RecordedState, read_state
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.faults.server import FaultServer, Hang
from embedding_pipeline_tests.project import (
    fresh_settings,
    set_variables,
    use_database,
    write_tables,
)
from embedding_pipeline_tests.sessions import wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
TEI_MODEL, OTHER_MODEL = "test-model-4", "test-model-8"
FOUR = embedding(model=TEI_MODEL, prefix="passage: ")
EIGHT = embedding("embedding_8", 8, provider="openai", model=OTHER_MODEL)


@pytest.fixture
def tei() -> Iterator[FaultServer]:
    with FaultServer(dimensions=4, model=TEI_MODEL) as server:
        yield server


@pytest.fixture
def other() -> Iterator[FaultServer]:
    with FaultServer(dimensions=8, model=OTHER_MODEL, api_key="sk-test") as server:
        yield server


@pytest.fixture(autouse=True)
def no_providers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "PROVIDERS_FILE", tmp_path / "providers.yaml")


def settings_of(
    mode: str, tei: FaultServer | None = None, other: FaultServer | None = None, **more: str
) -> Settings:
    values = {
        "EMBEDDING_MODE": mode,
        "EMBEDDING_SERVICE_URL": tei.tei_url if tei else "http://127.0.0.1:9",
        "OPENAI_BASE_URL": other.openai_url if other else "http://127.0.0.1:9/v1",
        "OPENAI_API_KEY": "sk-test",
        **more,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        return Settings()


def both() -> TableSpec:
    return spec(embeddings=[FOUR, EIGHT])


def test_each_mode_names_endpoint_model_and_column(tei: FaultServer, other: FaultServer) -> None:
    async def ask(mode: str) -> tuple[str, str, str | None, bool]:
        embedder = make_query_embedder(settings_of(mode, tei, other), both())
        answer = await embedder.embed_query("a question")
        await embedder.aclose()
        truth = (tei if answer.endpoint == "tei" else other).truth(["a question"])[0]
        assert answer.vector.tolist() == truth.tolist(), "as it was asked: no prefix of documents"
        return answer.endpoint, answer.model, answer.column, answer.fell_back

    assert asyncio.run(ask("server")) == ("tei", TEI_MODEL, "embedding_4", False)
    assert asyncio.run(ask("openai")) == ("openai", OTHER_MODEL, "embedding_8", False)
    assert asyncio.run(ask("fallback")) == ("tei", TEI_MODEL, "embedding_4", False)


def test_server_mode_never_falls_back(other: FaultServer) -> None:
    async def main() -> None:
        embedder = make_query_embedder(settings_of("server", None, other), both())
        with pytest.raises(TransientError, match="cannot be reached"):
            await embedder.embed_query("a question")
        await embedder.aclose()

    asyncio.run(main())
    assert other.count.requests == 0


def test_up_down_up_searches_the_column_of_whoever_answered_and_everyone_can_see_it(
    database: str, connection: Connection, tei: FaultServer, other: FaultServer
) -> None:
    """After an outage nobody could tell which model had answered since when: the state died with
    the process."""
    table = both()
    create_docs(connection, 4)
    migrate(connection, [table])

    def recorded() -> RecordedState | None:
        return read_state(connection, table)

    async def main() -> None:
        embedder = make_query_embedder(
            settings_of("fallback", tei, other), table, record_in=database
        )
        embedder._head_start = 60.0  # who answers first must not depend on the machine
        asked = failed = 0
        for phase, server, column in (
            ("up", tei, "embedding_4"),
            ("down", other, "embedding_8"),
            ("up again", tei, "embedding_4"),
        ):
            if phase == "down":
                await asyncio.to_thread(tei.stop)
            elif phase == "up again":
                await asyncio.to_thread(tei.start)
            before = server.count.requests
            for number in range(5):
                answer = await embedder.embed_query(f"{phase} {number}")
                asked += 1
                assert answer.column == column
                assert answer.vector.tolist() == server.truth([f"{phase} {number}"])[0].tolist()
                assert answer.fell_back == (phase == "down")
            assert server.count.requests == before + 5
            wait_until(
                lambda active=answer.endpoint: (  # type: ignore[misc]
                    (seen := recorded()) is not None and seen.active == active
                ),
                "the switch to be recorded",
            )
            state = recorded()
            assert state is not None
            assert (state.column, state.fell_back) == (column, phase == "down")
            assert state.since == embedder.state.since
            if phase == "down":
                assert "cannot be reached" in str(state.last_error)
                assert "openai" in str(state)
                assert "stands in since" in str(state)
        assert (asked, failed) == (15, 0)
        await embedder.aclose()

    asyncio.run(main())
    with connection.cursor() as cursor:
        cursor.execute("SELECT s::text FROM embedding_pipeline.endpoint_state AS s")
        assert "sk-test" not in str(cursor.fetchall())


def test_a_stream_of_queries_writes_the_state_once(
    database: str, connection: Connection, tei: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    record = endpoint_state.record

    def counted(*arguments: Any) -> None:
        nonlocal written
        written += 1
        record(*arguments)

    monkeypatch.setattr(endpoint_state, "record", counted)
    migrate(connection, [])

    async def main() -> None:
        embedder = make_query_embedder(settings_of("server", tei), both(), record_in=database)
        for number in range(50):
            await embedder.embed_query(f"question {number}")
        await embedder.aclose()

    asyncio.run(main())
    wait_until(lambda: read_state(connection, both()) is not None, "the state to be recorded")
    assert written == 1


def test_a_database_that_is_away_fails_no_query(tei: FaultServer) -> None:
    async def main() -> None:
        embedder = make_query_embedder(
            settings_of("server", tei), both(), record_in="postgresql://nobody@127.0.0.1:9/none"
        )
        assert (await embedder.embed_query("a question")).column == "embedding_4"
        await embedder.aclose()

    asyncio.run(main())


def test_status_tells_who_answers_queries(
    database: str,
    connection: Connection,
    tei: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = spec(embeddings=[FOUR])
    create_docs(connection, 4)
    migrate(connection, [table])
    tei.rule = lambda number, inputs: Hang() if number else None

    async def main() -> datetime:
        embedder = make_query_embedder(settings_of("server", tei), table, record_in=database)
        await embedder.embed_query("a question")
        await embedder.aclose()
        return embedder.state.since

    with ExitStack() as opened:
        opened.enter_context(fresh_settings())
        use_database(monkeypatch, database)
        write_tables(tmp_path / "defs", table)
        set_variables(monkeypatch, EMBEDDING_PIPELINE_DEFS=str(tmp_path / "defs"))
        before = CliRunner().invoke(command_line, ["status", "--table", "docs", "--json"])
        since = asyncio.run(main())
        wait_until(lambda: read_state(connection, table) is not None, "the state to be recorded")
        shown = CliRunner().invoke(command_line, ["status", "--table", "docs"])
        plain = CliRunner().invoke(command_line, ["status", "--table", "docs", "--json"])
    assert "queries of docs: tei (test-model-4, column embedding_4) answers since" in shown.output
    assert "queries of" not in plain.output
    assert [row["query_endpoint"] for row in json.loads(before.stdout)] == [None]
    [state] = [row["query_endpoint"] for row in json.loads(plain.stdout)]
    assert (state["active"], state["model"], state["column"]) == (
        "tei",
        "test-model-4",
        "embedding_4",
    )
    assert datetime.fromisoformat(state["since"]) == since.replace(
        microsecond=since.microsecond // 1000 * 1000
    )
    assert state["latency_ms"] > 0
    assert (state["fell_back"], state["last_error"], state["last_error_at"]) == (False, None, None)


@pytest.mark.parametrize(
    ("mode", "columns", "said"),
    [
        ("server", [EIGHT], "a TEI endpoint.*embedding_8 is filled by openai.*MODE=openai,"),
        ("openai", [FOUR], "an OpenAI-dialect endpoint.*embedding_4 is filled by tei.*MODE=server"),
        ("fallback", [FOUR], "an OpenAI-dialect endpoint.*MODE=server"),
        ("fallback", [EIGHT], "a TEI endpoint.*MODE=openai"),
    ],
)
def test_an_impossible_mode_says_what_is_possible(
    mode: str, columns: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        make_query_embedder(settings_of(mode), spec(embeddings=columns))


def test_a_provider_without_its_key_is_named() -> None:
    settings = Settings.model_construct(embedding_mode=EmbeddingMode.OPENAI)
    with pytest.raises(SettingsError, match=r"embedding_8, whose provider openai.*OPENAI_API_KEY"):
        make_query_embedder(settings, both())


def test_of_several_columns_the_active_one_is_asked_for() -> None:
    local = embedding("embedding_local", 8, provider="local", model=OTHER_MODEL)
    table = spec(embeddings=[local, EIGHT, FOUR])

    def column(active: str | None) -> str | None:
        return make_query_embedder(settings_of("openai"), table, active=active).state.column

    assert column(None) == "embedding_8"
    assert column("embedding_local") == "embedding_local"
    assert column("embedding_4") == "embedding_8"
