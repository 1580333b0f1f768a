"""The addresses in ALERT_URLS, as text: nothing heavy is imported to read a setting."""

import re

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,20}://"
_SEPARATOR = re.compile(rf"[\s,]+(?={_SCHEME})")
"""Between two addresses; a comma within one (`mailto://…?to=a,b`) is part of it."""


def split_urls(text: str) -> list[str]:
    """The addresses of ALERT_URLS: separated by commas, blanks or line ends."""
    parts = (part.strip(" \t\r\n,") for part in _SEPARATOR.split(text))
    return [part for part in parts if part]


def scheme(url: str) -> str:
    """What stands before `://`; an entry without that may be a secret, pasted as it is."""
    found = re.match(_SCHEME, url)
    return found[0].removesuffix("://").lower() if found else "(no scheme)"


def entries_without_scheme(text: str) -> list[int]:
    """Places, from 1, of entries that are no address; blanks within one separate entries too."""
    entries = [part for url in split_urls(text) for part in url.split()]
    return [place for place, entry in enumerate(entries, 1) if not re.match(_SCHEME, entry)]
