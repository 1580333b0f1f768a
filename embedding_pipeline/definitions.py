"""The one entry point: everything under `defs/`, loaded by Dagster's component loader."""

import os
from pathlib import Path

import dagster as dg

from embedding_pipeline.components.embedded_table import table_definitions
from embedding_pipeline.spec_files import load_table_files

EXTRA_FOLDER_VARIABLE = "EMBEDDING_PIPELINE_DEFS"
"""A folder of further tables, outside this package: `<folder>/<table>/defs.yaml`."""


@dg.definitions
def defs() -> dg.Definitions:
    """Every table of `defs/`, and those of the extra folder where one is named."""
    shipped = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    extra = os.environ.get(EXTRA_FOLDER_VARIABLE)
    if not extra:
        return shipped
    return dg.Definitions.merge(
        shipped, *(table_definitions(file) for file in load_table_files(Path(extra)))
    )
