"""Which facts are problems. Pure: facts in, findings out; the thresholds stand beside the rules.

What heals by itself is no problem yet: a failed run is retried by its table's sensor, a provider
that hiccups is asked again, and a look that failed once is repeated at the next tick.
"""

from collections.abc import Iterable

from embedding_pipeline.alerts.facts import (
    CapFacts,
    ChannelFacts,
    FailedRun,
    ProviderFacts,
    TickFacts,
)
from embedding_pipeline.alerts.problems import Findings, Kind, Problem

TICK_FAILURES = 3
"""Failed ticks in a row that are news."""
SIGHTINGS = 2
"""Ticks running in which something that may pass by itself must be seen."""
SIGHTINGS_OF_A_RETRIED_RUN = 6
"""The same for a failed run that something asks for again: three minutes."""


def run_problems(runs: Iterable[FailedRun]) -> Findings:
    """Runs that died, and failed ones whose work nobody has done since.

    A run that died is told even when the next one has finished its work: something kills
    processes.
    """
    found = Findings()
    for run in runs:
        if run.recovered and not (run.died and run.new):
            continue
        if run.counted and not run.died:
            found.unknown.add((Kind.RUN.value, run.work))
            continue
        if run.died:
            what = "died (killed, out of memory, timed out, or its machine is gone)"
            remedy = (
                "Look at memory and at what ended the process. What it had written is kept; the "
                "table's sensor goes on with the rest."
            )
        else:
            what, remedy = "failed", "Open the run: its last lines say why. Then run it again."
        found.problems.append(
            Problem(
                Kind.RUN,
                run.work,
                f"Run {run.run_id[:8]} {what}: {run.error}",
                remedy,
                table=run.table,
                column=", ".join(sorted(name.rpartition(".")[2] for name in run.columns)) or None,
                since=run.at,
                link=f"runs/{run.run_id}",
                run_id=run.run_id,
                sightings=SIGHTINGS_OF_A_RETRIED_RUN if run.retried and not run.died else 1,
                affected=run.columns,
                own_cause=run.died,
            )
        )
    return found


def tick_problems(ticks: Iterable[TickFacts]) -> Findings:
    """Sensors and schedules that are stopped, silent, or fail tick after tick."""
    found = Findings()
    for facts in ticks:
        kind = Kind.SCHEDULE if facts.is_schedule else Kind.SENSOR
        silent = facts.silent_seconds
        if not facts.wanted:
            continue
        if not facts.running:
            summary = f"The {kind.value} {facts.name} is stopped"
            remedy = (
                "Start it in the Dagster UI (Automation). To leave a table alone for a while, "
                "pause the table instead."
            )
            value = "stopped"
        elif silent is None or silent > facts.quiet_seconds:
            if silent is None:
                value = "no tick yet"
            elif facts.is_schedule:
                value = f"was due {silent:.0f} s ago and did not tick"
            else:
                value = f"no tick for {silent:.0f} s"
            summary = f"The {kind.value} {facts.name} has stopped ticking: {value}"
            remedy = (
                "Is the Dagster daemon running, and does the code location load? Deployment "
                "(Daemons, Code locations) in the UI says so."
            )
        elif facts.failures >= TICK_FAILURES:
            summary = (
                f"{facts.failures} ticks in a row of the {kind.value} {facts.name} have failed"
            )
            summary += f". The latest said: {facts.error}"
            remedy = "Open it in the Dagster UI: each tick has its error."
            value = f"{facts.failures} failed ticks in a row"
        else:
            continue
        failing = value.endswith("in a row")
        found.problems.append(
            Problem(
                kind,
                facts.name,
                summary,
                remedy,
                table=facts.table,
                value=value,
                threshold=f"{TICK_FAILURES} in a row"
                if failing
                else f"at most {facts.quiet_seconds:.0f} s without a tick",
                link=facts.link,
                # after a restart the others have not ticked yet either
                sightings=1 if failing or not facts.running else SIGHTINGS + 2,
                affected=facts.columns,
                own_cause=not failing,
            )
        )
    return found


def provider_problems(providers: Iterable[ProviderFacts]) -> Findings:
    """Providers that do not answer while rows wait for them, or that refuse us for good."""
    found = Findings()
    for facts in providers:
        if facts.unknown:
            found.unknown.add((Kind.PROVIDER.value, facts.name))
        elif facts.error is not None:
            found.problems.append(
                Problem(
                    Kind.PROVIDER,
                    facts.name,
                    f"Provider {facts.name} {'refuses us' if facts.final else 'is down'}: "
                    f"{facts.error}",
                    "Check its key, quota and model (providers.yaml, environment)."
                    if facts.final
                    else "Check the server and its address. Rows wait and are embedded when it is "
                    "back; nothing is lost.",
                    value=f"{facts.rows:,} rows wait in {', '.join(sorted(facts.waiting))}",
                    link="runs",
                    sightings=1 if facts.final else SIGHTINGS,
                    affected=facts.waiting,
                )
            )
    return found


def cap_problems(caps: Iterable[CapFacts]) -> Findings:
    """Daily cost caps that are reached."""
    return Findings(
        [
            Problem(
                Kind.COST_CAP,
                facts.subject,
                f"The daily cost cap of {facts.subject} is reached; rows wait until "
                f"{facts.resets_at:%Y-%m-%d %H:%M %Z}",
                "Wait for the new day, or raise the cap. `embedding-pipeline status` shows what "
                "was spent.",
                value=f"${facts.spent:.4f} today",
                threshold=f"${facts.cap:g} a day",
                link="runs",
                affected=facts.waiting,
            )
            for facts in caps
        ]
    )


def channel_problems(channels: Iterable[ChannelFacts]) -> Findings:
    """Channels that take no alerts; the others tell of them."""
    return Findings(
        [
            Problem(
                Kind.CHANNEL,
                facts.channel,
                f"Alert channel {facts.channel} takes no messages: {facts.error}",
                "Check this entry of ALERT_URLS and its service; then: embedding-pipeline "
                "alert-test. What it has missed is sent when it answers.",
                value=f"{facts.waiting} undelivered",
                since=facts.since,
                link="locations/embedding_pipeline/sensors/alerts",
                sightings=SIGHTINGS,
                own_cause=True,
            )
            for facts in channels
        ]
    )


def database_problem(error: str) -> Findings:
    """The source tables' database cannot be reached; nothing else can be said of it then."""
    return Findings(
        [
            Problem(
                Kind.DATABASE,
                "source tables",
                f"The database with the source tables cannot be reached: {error}",
                "Check the server and DATABASE_URL. Runs wait up to a minute for it and are "
                "retried after that.",
                link="runs",
                sightings=SIGHTINGS + 1,
            )
        ]
    )
