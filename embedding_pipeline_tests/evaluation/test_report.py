"""The report is Markdown whatever users' texts hold."""

import re
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.evaluation.report import escape, quality_report
from embedding_pipeline_tests.evaluation.factories import evaluation, query_result


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(report: str) -> list[list[list[str]]]:
    """Every table of a report: header, rule and rows as cells."""
    blocks = [block for block in report.split("\n\n") if block.startswith("|")]
    return [[cells(line) for line in block.splitlines()] for block in blocks]


def test_figures_with_the_difference_to_the_baseline() -> None:
    old = evaluation([1, 2], column="old")
    new = evaluation([1, 1], column="new", index_recall=None, index_mrr_at_5=None,
                     index_p50_ms=None, index_p95_ms=None,
                     index_reason="new has no HNSW index")  # fmt: skip
    report = quality_report("docs", [old, new], baselines={"new": "old"})
    (figures, *_) = tables(report)
    assert figures[2][:6] == ["old", "a-model", "0.750", "0.500", "0.815", ""]
    assert figures[3][:5] == [
        "new",
        "a-model",
        "1.000 (+0.250)",
        "1.000 (+0.500)",
        "1.000 (+0.185)",
    ]
    assert figures[3][5] == "1.33"
    assert figures[3][6:10] == ["–", "–", "2.5", "–"]
    assert "- new: 1 query better and 0 worse than in old, which chance explains well" in report
    assert "- new: no figures by index: new has no HNSW index" in report


def test_worst_queries_show_ranks_and_what_was_found_instead() -> None:
    columns = [
        evaluation(
            column=name,
            results=(
                query_result("easy", 1),
                query_result("lost", None, expected=("a|b",), snippet="price | `list`\n# here"),
                query_result("third", 3, tenant="acme"),
                query_result("gone", None, missing=True),
                query_result("waiting", None, pending=True),
            ),
        )
        for name in ("one", "two")
    ]
    report = quality_report("docs", columns)
    _, worst = tables(report)
    assert [row[0] for row in worst[2:]] == ["lost", "waiting", "third (tenant acme)"]
    assert worst[2][1:4] == [r"a\|b", "> 10", "> 10"]
    assert worst[2][4] == r"other 1 (0.90): price \| \`list\` # here"
    assert worst[3][2:4] == ["pending", "pending"]
    assert worst[4][2:4] == ["3", "3"]
    assert "1 of 5 queries are left out" in report


def test_a_report_of_nothing_but_reasons() -> None:
    report = quality_report("docs", [], not_evaluated={"new": "not embedded | yet"})
    (figures,) = tables(report)
    assert figures[2][:2] == ["new", r"not evaluated: not embedded \| yet"]


def test_perfect_columns_have_no_worst_queries() -> None:
    assert "None: every query finds" in quality_report("docs", [evaluation([1, 1])])


def test_history_is_newest_first_and_short() -> None:
    first = evaluation([1])
    past = [
        evaluation([1], evaluated_at=first.evaluated_at + timedelta(days=day)) for day in range(15)
    ]
    report = quality_report("docs", [past[-1]], histories={"a": past, "b": []})
    rows = tables(report)[-1][2:]
    assert len(rows) == 10
    assert rows[0][0] == "2026-03-15 12:30"
    assert rows[-1][0] == "2026-03-06 12:30"


def test_a_plot_stands_in_the_report_as_a_picture_with_a_name() -> None:
    report = quality_report("docs", [evaluation([1])], plot="data:image/png;base64,AAAA")
    assert "![MRR@5 of each column over time](data:image/png;base64,AAAA)" in report
    assert "![" not in quality_report("docs", [evaluation([1])])


def test_long_text_is_cut_before_it_is_escaped() -> None:
    assert escape("|" * 200, 10) == r"\|" * 9 + "…"
    assert escape("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
    assert escape("see https://x.y") == "see https:&#47;&#47;x.y"
    assert escape("embedding_384 _so_ __bold__") == r"embedding_384 \_so\_ \_\_bold\_\_"
    assert escape("a\u202eb\x00c") == "ab c"


@given(st.text(), st.text(min_size=1))
def test_no_text_breaks_a_table(snippet: str, query: str) -> None:
    column = evaluation(results=(query_result(query, 2, expected=(query,), snippet=snippet),))
    for table in tables(quality_report("docs", [column], histories={"a": [column]})):
        assert len({len(row) for row in table}) == 1
    assert "\n" not in escape(snippet)
    assert not re.search(r"(?<!\\)(\\\\)*([`|*\[\]~]|_(?![a-zA-Z0-9]))", escape(snippet))
