"""`embedding-pipeline`: the command line.

Heavy imports (Dagster, pandas, openai) wait until a command needs them, so that `--help` and
`status` answer at once.
"""

from typing import Any

import click

from embedding_pipeline.cli import (
    alerts,
    brakes,
    embedding,
    inspection,
    quarantine,
    schema,
    serving,
)
from embedding_pipeline.cli.options import ERROR
from embedding_pipeline.errors import PipelineError


class _Group(click.Group):
    """Shows our own errors as a message and exits with 2; anything else is a defect and raises."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            click.echo(f"embedding-pipeline: {error}", err=True)
            ctx.exit(ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted; what was finished is kept, run it again to go on", err=True)
            ctx.exit(130)
        except Exception as error:
            if not _is_of_the_database(error):
                raise
            click.echo(f"embedding-pipeline: the database said: {error}", err=True)
            ctx.exit(ERROR)


def _is_of_the_database(error: Exception) -> bool:
    import psycopg

    return isinstance(error, psycopg.Error)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all well, 1 a check failed, 2 something could not be done. "
    "Without DATABASE_URL everything runs on an embedded Postgres under .local/.",
)
@click.version_option(package_name="embedding-pipeline")
def main() -> None:
    """Keeps pgvector embedding columns complete, current and comparable.

    \b
    First steps:
      embedding-pipeline run              the whole main job, headless
      embedding-pipeline status           every column: rows, embedded, pending
      embedding-pipeline dev              the Dagster UI, with sensors on
    """


for _command in (
    alerts.alert_test,
    embedding.run,
    embedding.backfill,
    brakes.pause,
    brakes.resume,
    inspection.status,
    inspection.evaluate,
    quarantine.retry,
    schema.migrate,
    schema.reset,
    schema.database_url_command,
    serving.dev,
):
    main.add_command(_command)
