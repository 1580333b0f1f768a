"""Alerts: what is wrong now, told once, and once more when it is over.

    facts ──rules──▶ problems ──reconcile──▶ incidents ──outbox──▶ channels

Rules are pure and look at the present state, not at a stream of events: a sensor that was away
for a night misses nothing that still matters. Incidents and their undelivered messages are rows in
the project's schema, so a crash at any point repeats a message at most and loses none.
"""

NAME = "alerts"
"""The sensor's."""
INTERVAL_SECONDS = 30
"""Between its ticks."""
