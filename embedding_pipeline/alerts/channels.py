"""The channels of ALERT_URLS, and sending to them through apprise.

An address is a secret as a whole (a Slack token stands in its path, a password before its host),
so a channel is named by its place in ALERT_URLS and its scheme: `1 slack`.
"""

import logging
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from embedding_pipeline.alerts.addresses import scheme, split_urls
from embedding_pipeline.errors import SettingsError
from embedding_pipeline.settings import Settings

LONGEST_ERROR = 300


class ChannelError(Exception):
    """A channel did not take a message; the words are fit to be shown."""


@dataclass(frozen=True)
class Channel:
    """One address of ALERT_URLS."""

    name: str
    """Place and scheme."""
    url: str

    def __repr__(self) -> str:
        return f"<channel {self.name}>"

    def send(self, title: str, body: str, *, recovery: bool = False) -> None:
        """Send one message; ChannelError when the service did not take it.

        Takes as long as apprise waits for a service: a few seconds (`cto` and `rto` in the
        address change it).
        """
        import apprise

        service = _instantiate(self.url)
        if service is None:
            raise ChannelError("apprise does not understand this address")
        kind = apprise.NotifyType.SUCCESS if recovery else apprise.NotifyType.FAILURE
        with _Complaints() as complaints:
            try:
                sent = service.notify(
                    title=title, body=body, notify_type=kind, body_format=apprise.NotifyFormat.TEXT
                )
            except Exception as error:  # noqa: BLE001 - many services; none may end a tick
                raise ChannelError(
                    self.without_secrets(f"{type(error).__name__}: {error}")
                ) from None
        if not sent:
            raise ChannelError(
                self.without_secrets("; ".join(complaints.lines)) or "the service did not take it"
            )

    def without_secrets(self, text: str) -> str:
        """Words of apprise or of a service, without any part of the address but its host."""
        # the parts of an address that may be secret, the longest first: one may contain another
        parts = set(re.split(r"[/?&=:@,\s]+", self.url))
        parts |= {unquote(part) for part in parts}
        for part in [self.url, *sorted(parts, key=len, reverse=True)]:
            if len(part) >= 5 and not _is_host_or_word(part):
                text = text.replace(part, "…")
        return " ".join(text.split())[:LONGEST_ERROR]


def _is_host_or_word(part: str) -> bool:
    """A plain IP address or word of apprise's own, which says nothing."""
    return bool(re.fullmatch(r"[0-9.]+|localhost|json|xml|form|slack|discord|mailto|mailtos", part))


class _Complaints(logging.Filter):
    """What apprise says in this thread while a message is sent; nobody else gets to see it.

    Its words, and urllib3's, may hold whole addresses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True  # another channel's, whose own filter takes it
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())
        return False

    def __enter__(self) -> "_Complaints":
        logging.getLogger("urllib3").setLevel(logging.WARNING)
        logging.getLogger("apprise").addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("apprise").removeFilter(self)


def _instantiate(url: str) -> Any:
    import apprise

    with _Complaints():  # it logs the address that it cannot read
        return apprise.Apprise.instantiate(url, suppress_exceptions=True)


def configured(settings: Settings) -> list[Channel]:
    """The channels of ALERT_URLS, none where it is not set; nothing is contacted."""
    if settings.alert_urls is None:
        return []
    urls = split_urls(settings.alert_urls.get_secret_value())
    return [Channel(f"{number} {scheme(url)}", url) for number, url in enumerate(urls, 1)]


def unusable(channels: Iterable[Channel]) -> list[str]:
    """Names of channels whose address apprise does not understand."""
    return [channel.name for channel in channels if _instantiate(channel.url) is None]


def checked(settings: Settings) -> list[Channel]:
    """`configured`, or SettingsError that names the entries that are no addresses."""
    channels = configured(settings)
    wrong = unusable(channels)
    if wrong:
        raise SettingsError(_words(wrong))
    return channels


def _words(wrong: Sequence[str]) -> str:
    entries = ", ".join(wrong)
    return (
        f"ALERT_URLS: {entries}: not an address that apprise "
        "understands (a value is a secret and not shown); see "
        "https://appriseit.com/services/ for each service's form"
    )
