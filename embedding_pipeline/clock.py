"""Times of day and time zones, as the settings and a table's YAML write them."""

import re
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")


def time_of_day(value: object) -> str:
    """`02:30`; ValueError that says how it is written for anything else."""
    # YAML 1.1 reads 13:30 without quotes as a number to the base of sixty
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError('must be a time of day from "00:00" to "23:59", in quotes')
    return value


def time_zone(value: str) -> str:
    """An IANA name; ValueError with similar names for what is none."""
    known = available_timezones()
    if value in known:
        return value
    place = value.rpartition("/")[2].casefold().replace(" ", "_")
    similar = sorted(name for name in known if place and place in name.casefold())[:3]
    raise ValueError(
        f"{value!r} is no time zone; write an IANA name such as "
        + (", ".join(similar) or "UTC or Europe/Madrid")
    )


def cron(at: str) -> str:
    """Daily at this time of day, as cron writes it."""
    hour, minute = at.split(":")
    return f"{int(minute)} {int(hour)} * * *"


def next_time(at: str, zone: str, now: datetime) -> datetime:
    """When this time of day comes next, on the clock of the zone. `now` knows its zone."""
    hour, minute = map(int, at.split(":"))
    here = now.astimezone(ZoneInfo(zone))
    today = here.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return today if today > here else today + timedelta(days=1)
