"""The lines that `dev` shows of Dagster's processes: their words, without what repeats itself."""

import re
import time

QUIET_SECONDS = 600.0
"""So long an error that comes again with every tick is not shown again; the UI counts them all."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINE = re.compile(
    r"\d{4}-\d\d-\d\d (?P<time>\d\d:\d\d:\d\d) [+-]\d{4} - (?P<logger>[\w.]+) - "
    r"(?P<level>[A-Z]+) - (?P<rest>.*)"
)
_OF_A_RUN = re.compile(
    r"\S+ - (?P<run>[0-9a-f]{8})-[0-9a-f-]{27}(?: - \d+)? - (?:(?P<step>\w+) - )?(?P<words>.*)"
)
_OF_A_SENSOR = re.compile(r"__repository__ - (?P<name>\w+) - (?P<words>.*)")
_STACKS = (
    "Traceback (most recent call last):",
    "Stack Trace:",
    "The above exception was",
    "During handling of the above exception",
)


class LogView:
    """Turns lines of Dagster's log into what a person wants to read of them."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def line(self, line: str, now: float | None = None) -> str | None:
        """One line as it is shown, None for one that is not: stacks, blanks, repeated errors.

        A run's line is time, run and words, `10:15:02  71f6cac5  docs.e: 183 rows pending …`; a
        level above INFO is named.
        """
        now = time.monotonic() if now is None else now
        plain = _COLOUR.sub("", line.rstrip())
        found = _LINE.fullmatch(plain)
        if found is None:
            # the rest of an error: its words, not the way through the code to them
            if not plain or plain.startswith((" ", *_STACKS)):
                return None
            return plain if self._is_news(plain, now) else None
        level = "" if found["level"] in ("INFO", "DEBUG") else f"{found['level']}  "
        of_run = _OF_A_RUN.fullmatch(found["rest"]) if found["logger"] == "dagster" else None
        if of_run is not None:
            return f"{found['time']}  {of_run['run']}  {level}{of_run['words']}"
        of_sensor = _OF_A_SENSOR.fullmatch(found["rest"])
        words = f"{of_sensor['name']}: {of_sensor['words']}" if of_sensor else found["rest"]
        return f"{found['time']}  {level}{words}" if self._is_news(words, now) else None

    def _is_news(self, words: str, now: float) -> bool:
        before = self._shown.get(words)
        if before is not None and now - before < QUIET_SECONDS:
            return False
        self._shown = {old: at for old, at in self._shown.items() if now - at < QUIET_SECONDS}
        self._shown[words] = now
        return True
