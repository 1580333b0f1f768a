"""A first visit, click by click, at 1280 × 800. A picture of each page is in test-artifacts/."""

import json
import re

import pytest
from playwright.sync_api import Locator, Page, expect

from embedding_pipeline_tests.ui.conftest import Project

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TABLES = ("bora_docs", "knowledge_chunks", "lexicon", "phrases")
MINUTES = 120_000
"""Milliseconds that a run or a tick may take on a busy machine."""


def counts(project: Project, table: str, column: str) -> dict[str, int]:
    (row,) = json.loads(project.run("status", "--json", "--table", table, "--column", column))
    return {name: row[name] for name in ("rows", "embedded", "pending")}


def text(page: Page, words: str, exact: bool = True) -> Locator:
    return page.get_by_text(words, exact=exact).first


def fold(page: Page, *sections: str) -> None:
    """Close sections of an asset's page, so that what is below them comes into view."""
    for section in sections:
        text(page, section).click()


class TestAFirstMaterialisation:
    """`lexicon` has nothing embedded until somebody clicks."""

    def test_the_graph_has_a_group_for_each_table(self, page: Page) -> None:
        page.goto("/asset-groups")
        for table in TABLES:
            expect(text(page, table)).to_be_visible()

    def test_a_column_says_what_a_click_will_do(self, page: Page) -> None:
        page.goto("/assets/lexicon/embedding_384?view=overview")
        for words in ("for every row one vector of 384 dimensions", "4 buckets"):
            expect(text(page, words, exact=False)).to_be_visible()
        for words in ("Owners", "README.md", "defs.yaml"):
            expect(text(page, words, exact=False)).to_be_visible()

    def test_partitions_of_values_are_there_before_any_sensor_ticks(self, page: Page) -> None:
        page.goto("/assets/knowledge_chunks/embedding_384?view=partitions")
        expect(text(page, "Missing (4)")).to_be_visible()

    def test_select_click_watch_understand(self, page: Page, project: Project) -> None:
        assert counts(project, "lexicon", "embedding_384") == {
            "rows": 225,
            "embedded": 0,
            "pending": 225,
        }
        page.goto("/assets/lexicon/embedding_384?view=partitions")
        expect(text(page, "Missing (4)")).to_be_visible()
        page.get_by_text("Materialize…").first.click()
        page.get_by_role("button", name="All", exact=True).click()
        page.screenshot(path=project.pictures / "launch_dialog.png")
        page.get_by_role("button", name=re.compile("^Launch")).last.click()
        expect(text(page, "Materialized (4)")).to_be_visible(timeout=MINUTES)
        assert counts(project, "lexicon", "embedding_384") == {
            "rows": 225,
            "embedded": 225,
            "pending": 0,
        }
        text(page, "3").click()
        for name in ("embedded", "remaining", "tokens", "pending", "rows_per_second"):
            expect(text(page, name)).to_be_visible()
        page.screenshot(path=project.pictures / "partition.png")
        # what happened, in the run's own words
        page.locator("a[href^='/runs/']").first.click()
        expect(text(page, "225 rows pending in 4 of 4 partitions", exact=False)).to_be_visible()
        expect(text(page, "225 rows embedded in", exact=False)).to_be_visible()
        expect(text(page, "nothing is pending now", exact=False)).to_be_visible()


@pytest.fixture(scope="module")
def complete(project: Project) -> Project:
    """`phrases` embedded, indexed, evaluated and checked; twice, so that a line has two ends."""
    for _ in range(2):
        project.run("run", "--table", "phrases")
    return project


class TestACompleteTable:
    def test_the_graph_shows_where_vectors_come_from(self, page: Page, complete: Project) -> None:
        page.goto("/locations/embedding_pipeline/asset-groups/phrases")
        for name in ("phrases", "embedding_384", "embedding_384_index", "retrieval_quality"):
            expect(text(page, name)).to_be_visible()
        expect(text(page, "Observed")).to_be_visible()
        expect(page.get_by_text("4 / 4 Passed")).to_have_count(2)

    def test_no_group_warns(self, page: Page, complete: Project) -> None:
        """A source table that nobody had observed was an orange 1 without a word."""
        page.goto("/asset-groups")
        group = page.locator("foreignObject").filter(has_text="phrases")
        expect(group.get_by_text("6", exact=True)).to_be_visible()
        expect(group.get_by_text("1", exact=True)).to_have_count(0)

    def test_the_source_table_has_been_counted(self, page: Page, complete: Project) -> None:
        page.goto("/assets/phrases?view=overview")
        expect(text(page, "247")).to_be_visible()
        expect(text(page, "embedding_1536_pending")).to_be_visible()
        expect(page.get_by_role("button", name="Observe")).to_be_visible()

    def test_columns_say_what_they_are(self, page: Page, complete: Project) -> None:
        page.goto("/assets/phrases/embedding_384?view=overview")
        fold(page, "Status", "Description")
        expect(text(page, "384-dim vector by sentence-transformers", exact=False)).to_be_visible()
        for column in ("id", "english", "spanish", "embedding_384_fingerprint"):
            expect(text(page, column)).to_be_attached()
        expect(text(page, "read by the text", exact=False)).to_be_attached()

    def test_figures_of_runs_are_plotted_over_time(self, page: Page, complete: Project) -> None:
        page.goto("/assets/phrases/embedding_384?view=overview")
        page.get_by_role("button", name="Plots").click()
        page.get_by_role("button", name="Events").click()
        fold(page, "Status", "Description", "Columns")
        for name in ("pending", "rows_per_second", "run_cost_usd", "run_tokens"):
            expect(text(page, name)).to_be_attached()
        expect(page.locator("canvas").first).to_be_visible()

    def test_quality_is_plotted_over_time(self, page: Page, complete: Project) -> None:
        page.goto("/assets/phrases/retrieval_quality?view=overview")
        page.get_by_role("button", name="Plots").click()
        fold(page, "Status", "Description")
        for column in ("embedding_1536", "embedding_384"):
            for figure in ("mrr_at_5", "hit_at_1", "p95_ms"):
                expect(text(page, f"{column}_{figure}")).to_be_attached()
        expect(page.locator("canvas").first).to_be_visible()

    def test_the_report_has_a_picture_and_the_worst_queries(
        self, page: Page, complete: Project
    ) -> None:
        page.goto("/assets/phrases/retrieval_quality?view=overview")
        fold(page, "Description")  # which names the link too
        text(page, "Show Markdown", exact=False).click()
        expect(page.get_by_role("heading", name="Retrieval quality of phrases")).to_be_visible()
        picture = page.get_by_alt_text("MRR@5 of each column over time")
        expect(picture).to_be_visible()
        assert picture.evaluate("picture => picture.naturalWidth") == 640
        worst = page.get_by_role("heading", name="Worst queries")
        worst.scroll_into_view_if_needed()
        expect(text(page, "found first instead")).to_be_visible()
        page.screenshot(path=complete.pictures / "report_worst_queries.png")
        heading = page.get_by_role("heading", name="Retrieval quality of phrases")
        heading.scroll_into_view_if_needed()
        # nothing is cut off at the right at this width
        table = page.get_by_role("table").filter(has_text="nDCG@10").first
        assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")

    @pytest.mark.parametrize(
        ("check", "asks", "found"),
        [
            ("coverage", "Every eligible row has the vector", "all 247 rows are embedded"),
            ("golden_mrr", "MRR@5 on the golden set is at least 0.6", "MRR@5 is 0."),
            ("index_recall", "The HNSW index finds at least 90%", "of the exact top 10"),
            ("vectors_valid", "No vector is all zeros", "247 vectors are valid"),
        ],
        ids=["coverage", "golden_mrr", "index_recall", "vectors_valid"],
    )
    def test_a_check_explains_itself(
        self, page: Page, complete: Project, check: str, asks: str, found: str
    ) -> None:
        page.goto(f"/assets/phrases/embedding_1536?view=checks&checkDetail={check}")
        expect(text(page, asks, exact=False)).to_be_visible()
        expect(text(page, "When it fails")).to_be_visible()
        expect(text(page, found, exact=False)).to_be_visible()


class TestTheSensor:
    def test_a_tick_that_asks_for_nothing_says_why(self, page: Page, complete: Project) -> None:
        page.goto("/locations/embedding_pipeline/sensors/phrases_pending")
        expect(text(page, "Embeds new and changed rows of", exact=False)).to_be_visible()
        switch = page.locator("label").filter(has=page.get_by_role("checkbox"))
        switch.click()
        page.get_by_role("button", name="0 runs requested").first.click(timeout=MINUTES)
        expect(text(page, "embedding_384: nothing pending", exact=False)).to_be_visible()
        page.screenshot(path=complete.pictures / "sensor_reason.png")
        page.get_by_role("button", name="Close").click()
        switch.click()
        expect(page.get_by_role("checkbox")).not_to_be_checked()

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("sensors/alerts", "Tells the channels of ALERT_URLS what is wrong"),
            ("sensors/nightly_follow_up", "night"),
            ("schedules/nightly", "embeds whatever is pending"),
        ],
    )
    def test_what_runs_unattended_says_what_it_does(
        self, page: Page, complete: Project, path: str, words: str
    ) -> None:
        """Alerts about them link to these pages (`alerts/look_at_ticks.py`)."""
        page.goto(f"/locations/embedding_pipeline/{path}")
        expect(text(page, words, exact=False)).to_be_visible()

    def test_a_paused_table_says_who_when_and_why(self, page: Page, complete: Project) -> None:
        complete.run("pause", "phrases", "--reason", "the glossary is being rewritten")
        try:
            page.goto("/locations/embedding_pipeline/sensors/phrases_pending")
            page.get_by_role("button", name="Preview tick result").click()
            page.get_by_role("button", name="Continue").click()
            reason = text(page, "the glossary is being rewritten", exact=False)
            expect(reason).to_be_visible(timeout=MINUTES)
            expect(text(page, "paused", exact=False)).to_be_visible()
            page.screenshot(path=complete.pictures / "paused_table.png")
        finally:
            complete.run("resume", "phrases")

    def test_jobs_say_what_they_do(self, page: Page, complete: Project) -> None:
        page.goto("/jobs")
        for job in ("pause_embedding", "resume_embedding", "retry_quarantined"):
            expect(text(page, job)).to_be_visible()
