"""`alert-test`: whether an alert would arrive."""

import json
import sys

import click

from embedding_pipeline.cli.options import ERROR
from embedding_pipeline.errors import PipelineError


@click.command("alert-test")
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one a channel.")
def alert_test(as_json: bool) -> None:
    """Send one test message to every channel of ALERT_URLS, and say what became of it.

    A channel is named by its place in ALERT_URLS and its scheme: its address is a secret. Exit
    code 2 when a channel did not take the message.

    \b
      ALERT_URLS="slack://… mailto://…" embedding-pipeline alert-test
    """
    import socket
    import time

    from embedding_pipeline.alerts.channels import ChannelError, configured
    from embedding_pipeline.settings import load_settings

    settings = load_settings()
    channels = configured(settings)
    if not channels:
        raise PipelineError(
            "ALERT_URLS is not set, so nobody is told of anything; set it to one or more "
            "addresses (https://appriseit.com/services/), separated by commas"
        )
    title = "[TEST] embedding-pipeline alerts"
    body = (
        f"A test of ALERT_URLS, sent by hand from {socket.gethostname()} (environment "
        f"{settings.embedding_pipeline_environment}). Nothing is wrong.\n"
        f"link: {settings.dagster_ui_url}"
    )
    results = []
    for channel in channels:
        started = time.monotonic()
        error = None
        try:
            channel.send(title, body, recovery=True)
        except ChannelError as refusal:
            error = str(refusal)
        seconds = round(time.monotonic() - started, 2)
        results.append({"channel": channel.name, "delivered": error is None, "error": error})
        if not as_json:
            said = "delivered" if error is None else f"NOT delivered: {error}"
            click.echo(f"{channel.name}: {said} ({seconds:.2f} s)")
    if as_json:
        click.echo(json.dumps(results, ensure_ascii=False, indent=2))
    if any(not result["delivered"] for result in results):
        sys.exit(ERROR)
