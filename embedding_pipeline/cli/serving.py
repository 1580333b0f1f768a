"""`dev`: the command that stays up."""

import sys

import click


@click.command()
@click.option("--port", default=3000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--sensors/--no-sensors", default=True, help="Start sensors and schedules switched on."
)
def dev(port: int, host: str, sensors: bool) -> None:
    """The Dagster UI, daemon, sensors and nightly schedule on this machine, until Ctrl-C."""
    from embedding_pipeline.dev import serve

    sys.exit(serve(host, port, sensors))
