"""What processes share of an endpoint: turns on its timeline and places for requests in flight.

One row an endpoint, changed by single statements: no session state and no transaction of several
round trips, so that it works behind a transaction pooler.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psycopg

from embedding_pipeline.embedders.found_rate import FoundRate

Connection = psycopg.Connection[Any]

FORGOTTEN_SECONDS = 24 * 3600.0
"""After which a rate that was found, and not changed since, says nothing any more."""
LAPSE_SECONDS = 10.0
"""After which the places of a holder that has not renewed them are anybody's."""


@dataclass(frozen=True)
class EndpointKey:
    """Which endpoint: its name, and a hash of its address without credentials."""

    name: str
    address_hash: str

    @classmethod
    def of(cls, name: str, address: str) -> "EndpointKey":
        return cls(name, hashlib.sha256(address.encode()).hexdigest()[:32])


@dataclass(frozen=True)
class Limits:
    """Requests and tokens a minute; None where unlimited or unknown."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute)


@dataclass(frozen=True)
class Holding:
    """The places of one process."""

    places: int
    """It may have so many requests in flight."""
    wanted: int
    beat: float
    """When it was renewed, in seconds of the database's clock."""
    joined: float


@dataclass(frozen=True)
class Shared:
    """The row as it was read."""

    now: float
    version: int
    learnt: Limits
    holders: dict[str, Holding]
    """Lapsed ones left out."""
    found: FoundRate = field(default_factory=FoundRate)
    found_version: int = 0


@dataclass(frozen=True)
class Reserved:
    """A piece of the timeline."""

    begins: float
    """In seconds of the database's clock; perhaps a little before `now`."""
    now: float
    """What the database's clock showed."""
    learnt: Limits
    """What anybody learnt in the last day."""
    found: FoundRate = field(default_factory=FoundRate)


def reserve(connection: Connection, key: EndpointKey, seconds: float, learnt: Limits) -> Reserved:
    """Reserve so many seconds of the endpoint's timeline, behind everybody else's.

    Limits given as `learnt` are taken over. One statement.
    """
    row = connection.execute(
        "INSERT INTO embedding_pipeline.endpoint_budget AS b (endpoint, address_hash, free_at,"
        " requests_per_minute, tokens_per_minute, learnt_at, used_at)"
        " VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3::float8), $4, $5,"
        " CASE WHEN coalesce($4::int, $5::int) IS NOT NULL THEN now() END, now())"
        " ON CONFLICT (endpoint, address_hash) DO UPDATE SET"
        " free_at = greatest(b.free_at, clock_timestamp()) + make_interval(secs => $3::float8),"
        " requests_per_minute = coalesce(excluded.requests_per_minute, b.requests_per_minute),"
        " tokens_per_minute = coalesce(excluded.tokens_per_minute, b.tokens_per_minute),"
        " learnt_at = coalesce(excluded.learnt_at, b.learnt_at), used_at = now()"
        " RETURNING extract(epoch FROM free_at)::float8 - $3::float8,"
        " extract(epoch FROM clock_timestamp())::float8,"
        " learnt_at > now() - interval '1 day', requests_per_minute, tokens_per_minute, found_rate",
        [
            key.name,
            key.address_hash,
            seconds,
            learnt.requests_per_minute,
            learnt.tokens_per_minute,
        ],
    ).fetchone()
    assert row is not None
    begins, now, fresh, requests, tokens, found = row
    limits = Limits(requests, tokens) if fresh else Limits()
    return Reserved(begins, now, limits, _found(found, now))


def read(connection: Connection, key: EndpointKey) -> Shared | None:
    """The row as it is now; None before anybody wrote it."""
    row = connection.execute(
        "SELECT extract(epoch FROM clock_timestamp())::float8, version,"
        " learnt_at > now() - interval '1 day', requests_per_minute, tokens_per_minute, holders,"
        " found_rate, found_version FROM embedding_pipeline.endpoint_budget"
        " WHERE endpoint = $1 AND address_hash = $2",
        [key.name, key.address_hash],
    ).fetchone()
    if row is None:
        return None
    now, version, fresh, requests, tokens, holders, found, found_version = row
    held = {name: Holding(**values) for name, values in holders.items()}
    return Shared(
        now,
        version,
        Limits(requests, tokens) if fresh else Limits(),
        {name: each for name, each in held.items() if now - each.beat < LAPSE_SECONDS},
        _found(found, now),
        found_version,
    )


def _found(kept: dict[str, Any] | None, now: float) -> FoundRate:
    found = FoundRate() if kept is None else FoundRate.from_json(kept)
    if now - found.since > FORGOTTEN_SECONDS:
        return FoundRate(generation=found.generation)
    return found


def replace_found_rate(
    connection: Connection, key: EndpointKey, version: int, found: FoundRate
) -> bool:
    """Write the rate that was found unless somebody else has since it was read."""
    cursor = connection.execute(
        "UPDATE embedding_pipeline.endpoint_budget SET found_rate = $4::jsonb,"
        " found_version = found_version + 1, used_at = now()"
        " WHERE endpoint = $1 AND address_hash = $2 AND found_version = $3",
        [key.name, key.address_hash, version, json.dumps(found.to_json())],
    )
    return cursor.rowcount == 1


def create(connection: Connection, key: EndpointKey) -> None:
    """Make the row; rows of addresses that nobody has used for a month are removed."""
    connection.execute(
        "DELETE FROM embedding_pipeline.endpoint_budget WHERE used_at < now() - interval '30 days'"
    )
    connection.execute(
        "INSERT INTO embedding_pipeline.endpoint_budget (endpoint, address_hash) VALUES ($1, $2)"
        " ON CONFLICT DO NOTHING",
        [key.name, key.address_hash],
    )


def replace_holders(
    connection: Connection, key: EndpointKey, version: int, holders: Mapping[str, Holding]
) -> bool:
    """Write the holders unless somebody else has since they were read."""
    cursor = connection.execute(
        "UPDATE embedding_pipeline.endpoint_budget SET holders = $4::jsonb,"
        " version = version + 1, used_at = now()"
        " WHERE endpoint = $1 AND address_hash = $2 AND version = $3",
        [
            key.name,
            key.address_hash,
            version,
            json.dumps({name: asdict(each) for name, each in holders.items()}),
        ],
    )
    return cursor.rowcount == 1


def fair_places(ceiling: int, holders: Mapping[str, Holding]) -> dict[str, int]:
    """How many places each should have: what it wants, as far as everybody's share allows.

    What nobody wants is spread over all, so that who comes to want more need not wait. Who came
    first gets the odd ones, and the first ones where there are fewer places than holders.
    """
    order = sorted(holders, key=lambda name: (holders[name].joined, name))
    fair = dict.fromkeys(order, 0)
    left, unmet = ceiling, list(order)
    while left > 0 and unmet:
        share = max(1, left // len(unmet))
        for name in unmet:
            more = min(share, left, max(1, holders[name].wanted) - fair[name])
            fair[name] += more
            left -= more
        unmet = [name for name in unmet if fair[name] < max(1, holders[name].wanted)]
    for number, name in enumerate(order):
        fair[name] += left // len(order) + (number < left % len(order))
    return fair


@dataclass(frozen=True)
class Allotment:
    """What a process may do about places from now on."""

    allowed: int
    """So many requests in flight."""
    fair: int
    """What it will be allowed once others have given back what is too much."""
    held: Holding


def allot(name: str, wanted: int, in_flight: int, ceiling: int, shared: Shared) -> Allotment:
    """The places of one process, as the others stand.

    What others hold is theirs until they give it back, and what is in flight is held until it
    has ended: the sum of what is held never passes the ceiling.
    """
    before = shared.holders.get(name)
    me = Holding(0, wanted, shared.now, before.joined if before else shared.now)
    others = {other: each for other, each in shared.holders.items() if other != name}
    free = max(0, ceiling - sum(each.places for each in others.values()))
    fair = fair_places(ceiling, {**others, name: me})[name]
    allowed = min(fair, free)
    return Allotment(allowed, fair, Holding(max(allowed, in_flight), wanted, shared.now, me.joined))
