"""The one incident that cannot be kept in the database: that the database is away.

It lives in the sensor's cursor, in Dagster's own storage. Where that is the same server, Dagster
is down too and nobody is told: `status`, and whatever watches that server, have to say so.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Self

from embedding_pipeline.alerts.channels import Channel, ChannelError
from embedding_pipeline.alerts.messages import alert_message, recovery_message
from embedding_pipeline.alerts.rules import database_problem


@dataclass
class Outage:
    """Since when the database has been away, and which channels know."""

    since: str | None = None
    sightings: int = 0
    error: str = ""
    told: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, cursor: str | None) -> Self:
        """From a sensor's cursor; none for an empty one."""
        return cls(**json.loads(cursor)) if cursor else cls()

    def write(self) -> str | None:
        """As a cursor."""
        return json.dumps(asdict(self)) if self.since else None

    def seen(self, error: str, channels: Sequence[Channel], ui: str) -> list[str]:
        """The database is away: tell those who do not know, once it has been for long enough."""
        self.since = self.since or datetime.now(UTC).isoformat()
        self.sightings += 1
        self.error = error
        problem = database_problem(error).problems[0]
        words = [problem.summary]
        if self.sightings < problem.sightings:
            return [*words, "it may pass: not told yet"]
        title, body = alert_message(problem, datetime.fromisoformat(self.since), ui)
        for channel in channels:
            if channel.name in self.told:
                continue
            try:
                channel.send(title, body)
            except ChannelError as refusal:
                words.append(f"not delivered: {channel.name}: {refusal}")
            else:
                self.told.append(channel.name)
        return words

    def over(self, channels: Sequence[Channel], ui: str) -> list[str]:
        """The database is back: tell those who know of it."""
        if self.since is None:
            return []
        problem = database_problem(self.error).problems[0]
        since = datetime.fromisoformat(self.since)
        title, body = recovery_message(problem, since, datetime.now(UTC), ui)
        words = ["the database is back"]
        for channel in channels:
            if channel.name not in self.told:
                continue
            try:
                channel.send(title, body, recovery=True)
            except ChannelError as refusal:
                words.append(f"not delivered: {channel.name}: {refusal}")
            else:
                self.told.remove(channel.name)
        if not set(self.told) & {channel.name for channel in channels}:
            self.since, self.sightings, self.told = None, 0, []
        return words
