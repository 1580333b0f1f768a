"""The words of an alert and of a recovery."""

from datetime import UTC, datetime, timedelta

from embedding_pipeline.alerts.problems import Problem

LONGEST_LINE = 600
"""Characters: a provider's words may be long, a text message may not."""


def alert_message(problem: Problem, first_seen: datetime, ui: str) -> tuple[str, str]:
    """Title and body of the alert for an incident; `ui` is the Dagster UI's address."""
    lines = [
        problem.summary,
        "",
        *_facts(problem),
        f"since: {_moment(first_seen)}",
        f"what to do: {problem.remedy}",
        *_link(problem, ui),
    ]
    return f"[ALERT] {headline(problem)}", "\n".join(map(_cut, lines))


def recovery_message(
    problem: Problem, first_seen: datetime, recovered: datetime, ui: str
) -> tuple[str, str]:
    """Title and body of the message that an incident is over."""
    lines = [
        f"This is over: {problem.summary}",
        "",
        *_names(problem),
        f"since: {_moment(first_seen)}",
        f"recovered: {_moment(recovered)}, after {duration(recovered - first_seen)}",
        *_link(problem, ui),
    ]
    return f"[RECOVERED] {headline(problem)}", "\n".join(map(_cut, lines))


def headline(problem: Problem) -> str:
    """What is wrong with what: `check bora_docs.embedding_384: coverage`."""
    return f"{problem.kind} {problem.subject}"


def duration(span: timedelta) -> str:
    """About how long: `40 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    seconds = max(0, round(span.total_seconds()))
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _names(problem: Problem) -> list[str]:
    named = (("table", problem.table), ("column", problem.column), ("check", problem.check))
    return [f"{name}: {value}" for name, value in named if value]


def _facts(problem: Problem) -> list[str]:
    figures = (("value", problem.value), ("threshold", problem.threshold))
    return _names(problem) + [f"{name}: {value}" for name, value in figures if value]


def _link(problem: Problem, ui: str) -> list[str]:
    return [f"link: {ui}/{problem.link}"] if problem.link else []


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _cut(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"
