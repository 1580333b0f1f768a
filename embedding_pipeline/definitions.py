"""The one entry point: everything under `defs/`, loaded by Dagster's component loader."""

import atexit
import gc
import importlib
import os
import warnings
from dataclasses import dataclass

import dagster as dg

from embedding_pipeline.alerts.sensor import alert_sensor
from embedding_pipeline.components.brake_jobs import pause_embedding, resume_embedding
from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.components.nightly import nightly_definitions
from embedding_pipeline.components.retry_job import retry_quarantined
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.settings import PROJECT_ROOT
from embedding_pipeline.spec_files import DEFS_FOLDER, TableFile, all_table_files

# which of its own parameters Dagster calls beta is no news to those who use this project
for _category in (dg.BetaWarning, dg.PreviewWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"(dagster|embedding_pipeline)\.")

# The search for cycles took a third of the CPU time of a run's process (1.4 of 4.8 s), most of it
# among what was imported, which stays to the end: it is left out from here on, and everything is
# when the process ends, where the interpreter would look through it all several times
gc.freeze()
atexit.register(gc.freeze)


@dg.definitions
def defs() -> dg.Definitions:
    """Every table of `defs/`, and those of the folder that EMBEDDING_PIPELINE_DEFS names."""
    files, environment = _table_files(), dict(os.environ)
    if not (_built and (_built[0].files, _built[0].environment) == (files, environment)):
        _built[:] = [_Built(files, environment, _build(files))]
    return _built[0].definitions


@dataclass(frozen=True)
class _Built:
    """Definitions and all that they follow from."""

    files: list[TableFile]
    environment: dict[str, str]
    definitions: dg.Definitions


_built: list[_Built] = []
"""The last ones, if any: Dagster asks six times in a process that executes a run."""


def _build(files: list[TableFile]) -> dg.Definitions:
    further = [file for file in files if not file.path.is_relative_to(DEFS_FOLDER)]
    return dg.Definitions.merge(
        # Dagster's loader fails on a folder without components: whoever removed the samples
        *([_shipped()] if len(further) < len(files) else []),
        *map(table_definitions, further),
        nightly_definitions([file.spec for file in files]),
        # a step of its own process costs seconds to start; the run is the unit of scaling out
        dg.Definitions(
            executor=dg.in_process_executor,
            jobs=[retry_quarantined, pause_embedding, resume_embedding],
            sensors=[alert_sensor([file.spec for file in files])],
        ),
    )


def _shipped() -> dg.Definitions:
    # not `dg.load_from_defs_folder`, which needs a pyproject.toml above the package and warns
    # where the clone's folder has another name than the code location
    return dg.ComponentTree(
        defs_module=importlib.import_module("embedding_pipeline.defs"),
        project_root=PROJECT_ROOT,
        code_location_name="embedding_pipeline",
    ).build_defs()


def _table_files() -> list[TableFile]:
    """Every table, read before Dagster reads them: of a mistake in one it would show a tree of
    components and two stacks, and of mistakes in two files only the first."""
    try:
        return all_table_files()
    except PipelineError as error:
        # a new one, whose stack is this line: where in our code a mistake is found is no news
        raise type(error)(str(error)) from None
