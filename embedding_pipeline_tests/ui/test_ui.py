"""A first visit, click by click: the graph, one column's partitions, a materialisation, checks."""

import json
import re

import pytest
from playwright.sync_api import Page, expect

from embedding_pipeline_tests.ui.conftest import Project

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TABLES = ("bora_docs", "knowledge_chunks", "lexicon", "phrases")


def counts(project: Project, table: str, column: str) -> dict[str, int]:
    (row,) = json.loads(project.run("status", "--json", "--table", table, "--column", column))
    return {name: row[name] for name in ("rows", "embedded", "pending")}


def test_asset_graph_has_a_group_for_each_table(page: Page) -> None:
    page.goto("/asset-groups")
    for table in TABLES:
        expect(page.get_by_text(table, exact=True).first).to_be_visible()


def test_a_materialisation_by_click_embeds_every_row(page: Page, project: Project) -> None:
    assert counts(project, "phrases", "embedding_384") == {
        "rows": 247,
        "embedded": 0,
        "pending": 247,
    }
    page.goto("/assets/phrases/embedding_384?view=partitions")
    expect(page.get_by_text("Missing (8)")).to_be_visible()
    page.get_by_text("Materialize…").first.click()
    page.get_by_role("button", name="All", exact=True).click()
    page.get_by_role("button", name=re.compile("^Launch")).last.click()
    expect(page.get_by_text("Materialized (8)")).to_be_visible(timeout=120_000)
    assert counts(project, "phrases", "embedding_384") == {
        "rows": 247,
        "embedded": 247,
        "pending": 0,
    }
    page.get_by_text("3", exact=True).first.click()
    for name in ("embedded", "remaining", "tokens", "cost_usd", "rows_per_second"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()


def test_checks_of_a_column_explain_themselves(page: Page) -> None:
    page.goto("/assets/phrases/embedding_1536?view=checks")
    for name in ("coverage", "golden_mrr", "index_recall", "vectors_valid"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    expect(page.get_by_text("Every eligible row has the vector")).to_be_visible()


def test_the_sensor_says_what_it_is_for(page: Page) -> None:
    page.goto("/locations/embedding_pipeline/sensors/phrases_pending")
    expect(page.get_by_text("Embeds new and changed rows of").first).to_be_visible()
