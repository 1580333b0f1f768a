"""Incidents in the database, whatever comes and goes: messages alternate, none is doubled."""

import uuid
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from embedding_pipeline.alerts.incidents import open_incidents, reconcile
from embedding_pipeline.alerts.problems import Findings, Kind, Problem
from embedding_pipeline.store import ddl
from embedding_pipeline.store.project_schema import plan_project

Connection = psycopg.Connection[Any]


@pytest.fixture
def books(connection: Connection) -> Connection:
    """A database with the project's own tables and nothing else."""
    for step in plan_project(connection):
        ddl.execute(connection, step)
    return connection


def problem(sightings: int, subject: str = "docs.a") -> Problem:
    return Problem(Kind.PROVIDER, subject, "down", "wait", sightings=sightings)


def look(connection: Connection, environment: str, *problems: Problem, **unknown: Any) -> None:
    findings = Findings(list(problems), unknown.get("unknown", set()))
    now = datetime.now(UTC)
    reconcile(connection, environment, findings, ["1 json"], runs_until=now, ui="http://ui")


def events(connection: Connection, environment: str) -> list[str]:
    return [
        event
        for (event,) in connection.execute(
            "SELECT m.event FROM embedding_pipeline.alert_message AS m"
            " JOIN embedding_pipeline.incident AS i ON i.id = m.incident_id"
            " WHERE i.environment = $1 ORDER BY m.id",
            [environment],
        )
    ]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["seen", "gone", "unknown"]), max_size=14), st.integers(1, 3))
@example(["seen", "gone", "seen", "gone", "seen"], 2)
@example(["seen", "seen", "unknown", "unknown", "gone", "gone", "seen"], 2)
def test_messages_alternate_and_come_after_so_many_looks_in_a_row(
    books: Connection, looks: list[str], needed: int
) -> None:
    environment = uuid.uuid4().hex
    expected: list[str] = []
    told, seen, gone = False, 0, 0
    for each in looks:
        wrong = problem(needed)
        if each == "seen":
            look(books, environment, wrong)
            seen, gone = seen + 1, 0
        elif each == "gone":
            look(books, environment)
            seen, gone = (seen if told else 0), gone + 1
        else:
            look(books, environment, unknown={wrong.key})
        if not told and seen >= needed:
            told, gone = True, 0
            expected.append("alert")
        elif told and gone >= needed:
            told, seen = False, 0
            expected.append("recovery")
        assert events(books, environment) == expected


def test_environments_at_one_database_do_not_close_each_others_incidents(
    books: Connection,
) -> None:
    look(books, "production", problem(1))
    look(books, "staging")
    assert len(open_incidents(books, "production")) == 1
    assert open_incidents(books, "staging") == []


def test_the_message_says_since_when_it_was_known_to_be_wrong(books: Connection) -> None:
    began = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    wrong = Problem(Kind.CHECK, "docs.a: coverage", "rows wait", "look", since=began)
    look(books, "production", wrong)
    [row] = books.execute("SELECT body FROM embedding_pipeline.alert_message").fetchall()
    assert "since: 2026-01-02 03:04:05 UTC" in row[0]


def test_words_from_outside_may_hold_anything(books: Connection) -> None:
    """A provider's words reach a Postgres text, which takes no NUL and no half of a surrogate."""
    wrong = Problem(Kind.PROVIDER, "docs.a", "said \0 and \ud800", "wait")
    look(books, "production", wrong)
    assert len(open_incidents(books, "production")) == 1
