"""The lines that `dev` shows of Dagster's processes: their words, without what repeats itself."""

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINE = re.compile(
    r"\d{4}-\d\d-\d\d (?P<time>\d\d:\d\d:\d\d) [+-]\d{4} - (?P<logger>[\w.]+) - "
    r"(?P<level>[A-Z]+) - (?P<rest>.*)"
)
_OF_A_RUN = re.compile(
    r"\S+ - (?P<run>[0-9a-f]{8})-[0-9a-f-]{27}(?: - \d+)? - (?:(?P<step>\w+) - )?(?P<words>.*)"
)


def shown(line: str) -> str:
    """A line of Dagster's log as a person wants to read it: time, run, words.

    `10:15:02  71f6cac5  bora_docs.embedding_384: 183 rows pending …`; a level above INFO is named.
    Lines that are no log lines (a stack, say) stay as they are.
    """
    plain = _COLOUR.sub("", line.rstrip())
    found = _LINE.fullmatch(plain)
    if found is None:
        return plain
    of_run = _OF_A_RUN.fullmatch(found["rest"]) if found["logger"] == "dagster" else None
    level = "" if found["level"] in ("INFO", "DEBUG") else f"{found['level']}  "
    if of_run is None:
        return f"{found['time']}  {level}{found['rest']}"
    return f"{found['time']}  {of_run['run']}  {level}{of_run['words']}"
