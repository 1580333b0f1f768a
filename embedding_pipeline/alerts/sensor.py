"""The sensor `alerts`. It asks for no runs; what a tick does stands in `tick.py`."""

from collections.abc import Sequence

import dagster as dg

from embedding_pipeline.alerts import INTERVAL_SECONDS, NAME
from embedding_pipeline.components.sensor import default_sensor_status
from embedding_pipeline.spec import TableSpec


def alert_sensor(tables: Sequence[TableSpec]) -> dg.SensorDefinition:
    """The sensor `alerts` for these tables."""

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=default_sensor_status(),
        description=(
            "Tells the channels of ALERT_URLS what is wrong, once for each incident, and once more "
            "when it is over: failed checks, failed and killed runs, sensors and schedules that "
            "stopped, providers that are down, cost caps, quarantine. Every half minute it looks "
            "at the present state; a tick says what it found. A tick fails when an alert could not "
            "be delivered: it is sent again later. “embedding-pipeline alert-test” sends a test."
        ),
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        # here: whoever only loads the definitions needs nothing of it
        from embedding_pipeline.alerts.tick import tick

        origin = context.code_location_origin
        done = tick(
            context.instance,
            tables,
            context.repository_def,
            location=origin.location_name if origin is not None else None,
            cursor=context.cursor,
        )
        if done.cursor != context.cursor:
            context.update_cursor(done.cursor)
        if done.failed:
            raise dg.Failure("; ".join([*done.failed, *done.words]), allow_retries=False)
        return dg.SkipReason("; ".join(done.words))

    return alerts
