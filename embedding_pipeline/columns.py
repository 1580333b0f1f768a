"""Choosing tables and columns by name, for the command line."""

from collections.abc import Iterable, Sequence

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.spec_files import TableFile


def select(
    files: Iterable[TableFile], tables: Sequence[str], columns: Sequence[str]
) -> list[tuple[TableFile, list[EmbeddingSpec]]]:
    """The tables and columns that were asked for; all of them where nothing was.

    PipelineError for a name that does not exist, naming the ones that do.
    """
    files = list(files)
    if not files:
        raise PipelineError(
            "no table is declared: add a folder with a defs.yaml under embedding_pipeline/defs"
        )
    known = {file.spec.table for file in files}
    for table in tables:
        if table not in known:
            raise PipelineError(
                f"there is no table {table!r}; the YAML declares: {', '.join(sorted(known))}"
            )
    wanted = [file for file in files if not tables or file.spec.table in tables]
    every = {embedding.column: None for file in wanted for embedding in file.spec.embeddings}
    for column in columns:
        if column not in every:
            raise PipelineError(
                f"there is no column {column!r} in {', '.join(file.spec.table for file in wanted)};"
                f" the YAML declares: {', '.join(every)}"
            )
    chosen = [
        (file, [each for each in file.spec.embeddings if not columns or each.column in columns])
        for file in wanted
    ]
    return [(file, embeddings) for file, embeddings in chosen if embeddings]
