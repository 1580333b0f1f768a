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
    known = {file.spec.table for file in files}
    for table in tables:
        if table not in known:
            raise PipelineError(
                f"there is no table {table!r}; the YAML declares: {', '.join(sorted(known))}"
            )
    chosen = []
    for file in files:
        if tables and file.spec.table not in tables:
            continue
        embeddings = [e for e in file.spec.embeddings if not columns or e.column in columns]
        if embeddings:
            chosen.append((file, embeddings))
    if not chosen:
        every = sorted({e.column for file in files for e in file.spec.embeddings})
        raise PipelineError(
            f"no table has a column {', '.join(columns)}; known columns: {', '.join(every)}"
            if every
            else "no table is declared: add a folder with a defs.yaml under embedding_pipeline/defs"
        )
    return chosen
