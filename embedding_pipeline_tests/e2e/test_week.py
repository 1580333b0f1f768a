"""A week in minutes: seven nights by a clock of the test's own, while people change the rows.

Two of the shipped tables on the real model. Every night the schedule is ticked at its hour of the
next day, what it and its follow-up sensor ask for is run, and the alert sensor looks.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.alerts.tick import tick as look_for_alerts
from embedding_pipeline.components import names
from embedding_pipeline.components import nightly as nightly_module
from embedding_pipeline.components.nightly import FOLLOW_UP, ROUND_TAG, nightly_definitions
from embedding_pipeline.embedders import endpoints
from embedding_pipeline.local.model_server import stop_model_server
from embedding_pipeline.local.samples import load_samples
from embedding_pipeline.spec_files import load_table_files
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pending import coverage
from embedding_pipeline.store.spending import ALL, spending_today
from embedding_pipeline_tests.alerts.receiver import Received, Receiver
from embedding_pipeline_tests.components.dagster_project import DagsterProject
from embedding_pipeline_tests.e2e.project import temporary_folder
from embedding_pipeline_tests.project import fresh_settings, set_variables, use_database

Connection = psycopg.Connection[Any]
TABLES = ("knowledge_chunks", "phrases")
FIRST = datetime(2026, 3, 2, 2, 0, tzinfo=UTC)
DAYS = 7
PRICE = 0.02
"""US dollars per million tokens of the 1536-dim model, so that there is a cost to plot."""


@dataclass
class Night:
    """What one night was: its runs, what was left, who was told."""

    runs: list[dg.ExecuteInProcessResult]
    pending: dict[str, int]
    alerts: list[Received]

    @property
    def failed_checks(self) -> list[str]:
        return [
            f"{found.asset_key.to_user_string()} {found.check_name}: {found.description}"
            for run in self.runs
            for found in run.get_asset_check_evaluations()
            if not found.passed and found.severity is dg.AssetCheckSeverity.ERROR
        ]


class Week:
    """The project, night by night."""

    def __init__(self, connection: Connection, receiver: Receiver) -> None:
        self.connection, self.receiver = connection, receiver
        files = [file for file in load_table_files() if file.spec.table in TABLES]
        self.specs = [file.spec for file in files]
        load_samples(connection, lambda _: None)
        migrate(connection, self.specs)
        self.project = DagsterProject(files, nightly_definitions(self.specs))
        self._cursor: str | None = None

    def night(self, day: int) -> Night:
        requests, _ = self.project.start_schedule("nightly", FIRST + timedelta(days=day))
        runs = [self.project.launch(request) for request in requests]
        runs += self.project.settle(FOLLOW_UP)
        before = len(self.receiver.messages)
        done = look_for_alerts(
            self.project.instance, self.specs, self.project.repository, cursor=self._cursor
        )
        self._cursor = done.cursor
        return Night(runs, self.pending(), self.receiver.messages[before:])

    def pending(self) -> dict[str, int]:
        """`table.column` → pending rows, counted over every row."""
        return {
            str(column): coverage(self.connection, column).pending.pending
            for spec in self.specs
            for column in bind_columns(self.connection, spec)
        }

    def plotted(self, key: dg.AssetKey, figure: str) -> list[float]:
        """A figure of an asset's materialisations, one a run, oldest first."""
        by_run: dict[str, float] = {}
        for record in self.project.instance.fetch_materializations(key, limit=1000).records:
            materialisation = record.asset_materialization
            value = materialisation and materialisation.metadata.get(figure)
            if isinstance(value, dg.FloatMetadataValue | dg.IntMetadataValue):
                by_run[record.run_id] = float(value.value or 0)
        return list(reversed(by_run.values()))


def change_rows(connection: Connection, day: int) -> None:
    """A day's work: rows added, edited and deleted; on the third day a new company comes."""
    connection.execute(
        "INSERT INTO knowledge_chunks (empresa_id, document_id, chunk_index, contenido)"
        " SELECT $1, 'acta ' || $2::int, n, 'Acta del día ' || $2::int || ', punto ' || n"
        " || ': se revisan los pedidos y las entregas de la semana.'"
        " FROM generate_series(1, 5) AS n",
        ["cooperativa-nueva" if day >= 3 else "panaderia-del-sur", day],
    )
    connection.execute(
        "UPDATE knowledge_chunks SET contenido = contenido || ' (revisado el día ' || $1::int"
        " || ')' WHERE id IN (SELECT id FROM knowledge_chunks ORDER BY id OFFSET $1 * 7 LIMIT 4)",
        [day],
    )
    connection.execute(
        "DELETE FROM knowledge_chunks WHERE document_id = 'acta ' || ($1::int - 2)", [day]
    )
    connection.execute(
        "UPDATE phrases SET english = english || '.' WHERE id IN"
        " (SELECT id FROM phrases ORDER BY id OFFSET $1 * 11 LIMIT 6)",
        [day],
    )


@pytest.fixture
def week(database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[Week]:
    home = temporary_folder()
    prices = home / "providers.yaml"
    prices.write_text(
        "providers:\n  local:\n    price_per_million_tokens:"
        f" {{all-minilm-l6-v2-layers: {PRICE}}}\n"
    )
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        stack.enter_context(fresh_settings())
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.callback(stop_model_server, home)
        monkeypatch.setattr(endpoints, "PROVIDERS_FILE", prices)
        monkeypatch.setattr(nightly_module, "LAUNCHING_SECONDS", 0.0)
        use_database(monkeypatch, database)
        set_variables(
            monkeypatch,
            EMBEDDING_PIPELINE_HOME=str(home),
            ALERT_URLS=f"json://127.0.0.1:{receiver.port}",
        )
        yield Week(connection, receiver)


@pytest.mark.slow
def test_a_week_of_nights_leaves_nothing_pending_and_alarms_nobody(
    week: Week, connection: Connection
) -> None:
    assert sum(week.pending().values()) > 700, "nothing is embedded before the first night"
    for day in range(DAYS):
        if day:
            change_rows(connection, day)
            assert sum(week.pending().values()) >= 2 * (5 + 4 + 6)
        night = week.night(day)

        assert all(run.success for run in night.runs)
        assert set(night.pending.values()) == {0}, f"night {day}"
        assert night.failed_checks == []
        assert night.alerts == [], f"night {day}"
        closing = [r for r in night.runs if r.dagster_run.tags[ROUND_TAG] == "checks"]
        assert len(closing) == len(TABLES)
        assert all(len(r.get_asset_check_evaluations()) == 8 for r in closing)
        assert len(night.runs) <= 3 * len(TABLES), "a handful of runs"

    # what the UI plots: a figure a night
    for spec in week.specs:
        quality = names.quality_key(spec)
        for figure in ("embedding_384_mrr_at_5", "embedding_1536_mrr_at_5"):
            scores = week.plotted(quality, figure)
            assert len(scores) == DAYS
            assert min(scores) > 0.3
        paid = names.column_key(spec, spec.embedding("embedding_1536"))
        costs = week.plotted(paid, "run_cost_usd")
        assert len(costs) == DAYS
        assert costs[0] > max(costs[1:]) > 0, "the first night embeds all, the others what changed"
        assert connection.execute(
            "SELECT count(*) FROM embedding_pipeline.golden_set_result WHERE table_name = $1",
            [spec.table],
        ).fetchone() == (2 * DAYS,)
    [(booked,)] = connection.execute(
        "SELECT sum(cost_usd) FROM embedding_pipeline.run_result"
    ).fetchall()
    assert spending_today(connection, "UTC")[ALL].usd == pytest.approx(booked)
    assert connection.execute(
        "SELECT count(*), count(closed_at) FROM embedding_pipeline.night"
    ).fetchone() == (DAYS * len(TABLES), DAYS * len(TABLES))
