"""Sending what is waiting: in order for each channel, again with back-off where it fails."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from embedding_pipeline.alerts.channels import Channel, ChannelError
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.quarantine import storable

Connection = psycopg.Connection[Any]

BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 30.0, 3600.0
GIVE_UP_DAYS = 7
"""A message that a channel has refused for so long is no news any more."""
MOST_AT_ONCE = 20
"""Messages to one channel in one tick: services limit how many they take, and a tick its time."""
SENDING_SECONDS = 20.0
"""How long a tick goes on sending to a slow channel: Dagster gives a tick a minute in all."""
LONGEST_ERROR = 300


@dataclass(frozen=True)
class Undelivered:
    """What a channel has not taken."""

    channel: str
    messages: int
    since: datetime
    """When the oldest was written."""
    attempts: int
    """Most of any of them."""
    error: str | None
    next_try: datetime

    def __str__(self) -> str:
        return (
            f"{self.channel}: {self.messages} undelivered since "
            f"{self.since.isoformat(timespec='seconds')} after {self.attempts} "
            f"attempt{'s' * (self.attempts != 1)}: {self.error}"
        )


def deliver(url: str, environment: str, channels: Sequence[Channel]) -> int:
    """Send what is due, each channel in a thread of its own; how many messages have arrived.

    A channel's messages keep their order, so a recovery never overtakes its alert; after the first
    one that fails the channel is left alone until its back-off is over.
    """
    if not channels:
        return 0
    with ThreadPoolExecutor(len(channels), thread_name_prefix="alert") as threads:
        return sum(threads.map(lambda channel: _deliver(url, environment, channel), channels))


def _deliver(url: str, environment: str, channel: Channel) -> int:
    arrived = 0
    deadline = time.monotonic() + SENDING_SECONDS
    with connect(url) as connection:
        for message, event, title, body, _, due in connection.execute(
            sqlfiles.query("alerts/waiting"), [environment, channel.name, MOST_AT_ONCE]
        ).fetchall():
            if not due or time.monotonic() > deadline:
                break
            try:
                channel.send(title, body, recovery=event == "recovery")
            except ChannelError as error:
                connection.execute(
                    sqlfiles.query("alerts/refused"),
                    [
                        message,
                        storable(str(error), LONGEST_ERROR),
                        BACKOFF_SECONDS,
                        LONGEST_BACKOFF_SECONDS,
                        GIVE_UP_DAYS,
                    ],
                )
                break
            connection.execute(sqlfiles.query("alerts/delivered"), [message])
            arrived += 1
    return arrived


def undelivered(connection: Connection, environment: str) -> list[Undelivered]:
    """What has been tried and not taken, or waits behind such a message, by channel."""
    rows = connection.execute(sqlfiles.query("alerts/undelivered"), [environment]).fetchall()
    return [Undelivered(*row) for row in rows]
