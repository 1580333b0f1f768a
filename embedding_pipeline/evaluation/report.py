"""The `retrieval_quality` report of a table, as Markdown. Pure: evaluations in, text out."""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from embedding_pipeline.evaluation.compare import compare
from embedding_pipeline.evaluation.keys import Key, show_key
from embedding_pipeline.evaluation.result import Evaluation, QueryResult

LEGEND = (
    "MRR@5 is the mean of 1 / rank of the first expected row among the first five, hit@1 the share "
    "of queries whose first row is expected; 1 is perfect for both. p95: 95 % of searches ended "
    "within it. In brackets: the difference to the baseline."
)

WORST = 10
HISTORY = 10
LIKELY_CHANCE = 0.05
"""A p-value above it says no more than that the two columns may be equally good."""
_LONGEST = 90
_MARKUP = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
"""What means something in the middle of a line, where escaped text always stands. An underscore
within a word is a plain one."""


def quality_report(
    table: str,
    latest: Sequence[Evaluation],
    baselines: Mapping[str, str] | None = None,
    histories: Mapping[str, Sequence[Evaluation]] | None = None,
    *,
    not_evaluated: Mapping[str, str] | None = None,
    plot: str | None = None,
    worst: int = WORST,
) -> str:
    """Columns by figures, the queries that went worst, and earlier evaluations.

    `latest` has the newest evaluation of each column, in the order of the report; `baselines`
    maps a column to its baseline's column, `histories` a column to its evaluations, the newest
    ten of which are shown, and `not_evaluated` a column without an evaluation to the reason.
    `plot` is the `data:` URI of a picture of MRR@5 over time.
    Users' texts are escaped: nothing in them is Markdown or HTML in the report.
    """
    parts = [f"## Retrieval quality of {escape(table)}"]
    parts.append(_figures(latest, baselines or {}, not_evaluated or {}))
    if latest:
        parts.append(LEGEND)
    parts.extend(_notes(latest, baselines or {}))
    if plot is not None:
        parts.append(
            "### MRR@5 over time\n\n"
            f"![MRR@5 of each column over time]({plot})\n\n"
            "Dashed: the least that the YAML asks for. Dotted: the golden set changed."
        )
    if latest:
        parts.append(_worst_queries(latest, worst))
    if any((histories or {}).values()):
        parts.append(_history(histories or {}))
    return "\n\n".join(parts) + "\n"


def escape(text: str, limit: int = _LONGEST) -> str:
    """Any text as one line of plain Markdown that fits a table's cell, at most `limit` long."""
    # control and format characters (bidirectional overrides among them) would rearrange the page
    plain = "".join(
        " " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char
        for char in text
        if unicodedata.category(char) not in ("Cf", "Cs")
    )
    plain = " ".join(plain.split())
    if len(plain) > limit:
        plain = plain[: limit - 1].rstrip() + "…"
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = _MARKUP.sub(r"\\\1", plain)
    # what GitHub's dialect would make a link of
    return plain.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def _figures(
    latest: Sequence[Evaluation], baselines: Mapping[str, str], missing: Mapping[str, str]
) -> str:
    by_column = {evaluation.column_name: evaluation for evaluation in latest}
    rows = []
    for evaluation in latest:
        name = baselines.get(evaluation.column_name)
        baseline = by_column.get(name) if name else None
        if baseline and baseline.golden_set_hash != evaluation.golden_set_hash:
            baseline = None
        rows.append(
            [
                escape(evaluation.column_name),
                escape(evaluation.model),
                _with_delta(evaluation.mrr_at_5, baseline.mrr_at_5 if baseline else None),
                _with_delta(evaluation.hit_at_1, baseline.hit_at_1 if baseline else None),
                _with_delta(evaluation.ndcg_at_10, baseline.ndcg_at_10 if baseline else None),
                _ratio(evaluation, baseline) if name else "",
                _figure(evaluation.index_mrr_at_5),
                _figure(evaluation.index_recall),
                _figure(evaluation.p95_ms, 1),
                _figure(evaluation.index_p95_ms, 1),
                str(evaluation.scored),
                _percent(evaluation.coverage),
            ]
        )
    rows += [
        [escape(column), f"not evaluated: {escape(reason, 300)}"]
        for column, reason in missing.items()
    ]
    return _table(
        ["column", "model", "MRR@5", "hit@1", "nDCG@10", "of baseline", "MRR@5 by index",
         "index recall", "p95 ms", "p95 ms by index", "queries", "coverage"],
        rows,
    )  # fmt: skip


def _notes(latest: Sequence[Evaluation], baselines: Mapping[str, str]) -> list[str]:
    by_column = {evaluation.column_name: evaluation for evaluation in latest}
    notes = []
    for evaluation in latest:
        column = escape(evaluation.column_name)
        baseline = by_column.get(baselines.get(evaluation.column_name, ""))
        if baseline and baseline.golden_set_hash == evaluation.golden_set_hash:
            compared = _compared(evaluation, baseline)
            notes += [compared] if compared else []
        if evaluation.missing_expected:
            notes.append(
                f"- {column}: {evaluation.missing_expected} of {evaluation.queries} queries are "
                "left out, because none of their expected rows exists any more"
            )
        if evaluation.partly_missing:
            notes.append(
                f"- {column}: {evaluation.partly_missing} queries have expected rows that do not "
                "exist any more and were scored on the others"
            )
        waiting = sum(bool(result.pending) for result in evaluation.results)
        if waiting:
            notes.append(f"- {column}: the expected rows of {waiting} queries are pending")
        if evaluation.index_reason:
            notes.append(f"- {column}: no figures by index: {escape(evaluation.index_reason, 300)}")
    return ["\n".join(notes)] if notes else []


def _ratio(evaluation: Evaluation, baseline: Evaluation | None) -> str:
    if baseline is None:
        return "–"
    return _figure(compare(evaluation, baseline).ratio, 2)


def _compared(evaluation: Evaluation, baseline: Evaluation) -> str | None:
    """How a column stands beside its baseline, query by query."""
    found = compare(evaluation, baseline)
    if found.ratio is None or found.p_value is None:
        return None
    chance = (
        "which chance explains well"
        if found.p_value > LIKELY_CHANCE
        else "which chance hardly explains"
    )
    return (
        f"- {escape(evaluation.column_name)}: {_queries(found.wins)} better and "
        f"{found.losses} worse than in {escape(baseline.column_name)}, {chance} "
        f"(p = {found.p_value:.2f})"
    )


def _queries(count: int) -> str:
    return f"{count} {'query' if count == 1 else 'queries'}"


def _worst_queries(latest: Sequence[Evaluation], worst: int) -> str:
    """Queries by their mean reciprocal rank over the columns; perfect ones are not shown."""
    columns = [{result.name: result for result in each.results} for each in latest]
    results: dict[tuple[str, str | None], list[QueryResult | None]] = {
        name: [column.get(name) for column in columns] for column in columns for name in column
    }

    def badness(name: tuple[str, str | None]) -> tuple[float, str, str]:
        figures = [
            result.reciprocal_rank
            for result in results[name]
            if result is not None and result.reciprocal_rank is not None
        ]
        mean = sum(figures) / len(figures) if figures else 1.0
        return mean, name[0], name[1] or ""

    bad = [name for name in sorted(results, key=badness) if badness(name)[0] < 1][:worst]
    if not bad:
        return "### Worst queries\n\nNone: every query finds an expected row first."
    rows = []
    for name in bad:
        query, tenant = name
        known = [result for result in results[name] if result is not None and result.scored]
        rows.append(
            [
                escape(query) + (f" (tenant {escape(tenant, 40)})" if tenant is not None else ""),
                _keys(known[0].expected),
                *(_rank(result) for result in results[name]),
                _instead(known),
            ]
        )
    return "### Worst queries\n\n" + _table(
        [
            "query",
            "expected",
            *(f"rank in {escape(each.column_name)}" for each in latest),
            "found first instead",
        ],
        rows,
    )


def _instead(results: Sequence[QueryResult]) -> str:
    """What the worst of the columns found first."""
    result = min(results, key=lambda each: each.reciprocal_rank or 0.0)
    for found in result.found:
        if found.key not in result.expected:
            return f"{_keys([found.key])} ({found.score:.2f}): {escape(found.snippet)}"
    return "–"


def _history(histories: Mapping[str, Sequence[Evaluation]]) -> str:
    kept = [
        evaluation
        for evaluations in histories.values()
        for evaluation in sorted(evaluations, key=_age)[:HISTORY]
    ]
    rows = [
        [
            f"{evaluation.evaluated_at:%Y-%m-%d %H:%M}",
            escape(evaluation.column_name),
            escape(evaluation.model),
            _figure(evaluation.mrr_at_5),
            _figure(evaluation.hit_at_1),
            _figure(evaluation.ndcg_at_10),
            _figure(evaluation.index_recall),
            str(evaluation.scored),
            _percent(evaluation.coverage),
            evaluation.golden_set_hash[:8],
        ]
        for evaluation in sorted(kept, key=_age)
    ]
    return "### History\n\n" + _table(
        ["evaluated at", "column", "model", "MRR@5", "hit@1", "nDCG@10", "index recall",
         "queries", "coverage", "golden set"],
        rows,
    )  # fmt: skip


def _age(evaluation: Evaluation) -> tuple[float, str]:
    return -evaluation.evaluated_at.timestamp(), evaluation.column_name


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header)]
    lines += [[*row, *[""] * (len(header) - len(row))] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _keys(keys: Sequence[Key]) -> str:
    shown = [escape(show_key(key), 40) for key in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _rank(result: QueryResult | None) -> str:
    if result is None or not result.scored:
        return "–"
    if result.rank is not None:
        return str(result.rank)
    return "pending" if result.pending else "> 10"


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _with_delta(value: float | None, baseline: float | None) -> str:
    if value is None or baseline is None:
        return _figure(value)
    return f"{value:.3f} ({value - baseline:+.3f})"


def _percent(value: float | None) -> str:
    """Rounded down: 99.99 % is not all of it."""
    return "–" if value is None else f"{int(value * 1000) / 10:g} %"
