"""Reading `defs/<table>/defs.yaml`: which files there are, and errors that name file and line."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from embedding_pipeline.errors import SettingsError, SpecError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import (
    ColumnPartitions,
    EmbeddingSpec,
    HashPartitions,
    MonthPartitions,
    NightlySpec,
    TableSpec,
    dagster_name,
    short_name,
)
from embedding_pipeline.templates import resolve
from embedding_pipeline.yaml_documents import Document, Location, dotted, read_documents

COMPONENT_TYPE = "embedding_pipeline.EmbeddedTable"
DEFS_FOLDER = Path(__file__).resolve().parent / "defs"


@dataclass(frozen=True)
class TableFile:
    """A table's specification and the file that it came from."""

    spec: TableSpec
    path: Path
    line: int = 1
    """Where the file says `table:`."""

    @property
    def golden_set_path(self) -> Path | None:
        """Where the golden set lies; None for a table without one."""
        return self.path.parent / self.spec.golden_set if self.spec.golden_set else None


def all_table_files() -> list[TableFile]:
    """Every table: those of `defs/` and of the folder that EMBEDDING_PIPELINE_DEFS names.

    Sorted by table name. Raises SpecError with every mistake: file, line, key and remedy.
    """
    folders = [DEFS_FOLDER]
    extra = load_settings().embedding_pipeline_defs
    if extra is not None:
        if not extra.is_dir():
            raise SettingsError(
                f"EMBEDDING_PIPELINE_DEFS: there is no folder {extra}; "
                "make it, with a folder for each table in it, or unset the variable"
            )
        folders.append(extra)
    return _load(folders)


def load_table_files(folder: Path = DEFS_FOLDER) -> list[TableFile]:
    """Every `EmbeddedTable` below one folder, sorted by table name; SpecError as above."""
    return _load([folder])


def _load(folders: Iterable[Path]) -> list[TableFile]:
    files: list[TableFile] = []
    problems: list[str] = []
    for path in _paths(folders, problems):
        try:
            files += map(_validate, _tables(path))
        except SpecError as error:
            problems += str(error).splitlines()
    problems += _collisions(files)
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)))
    return sorted(files, key=lambda file: file.spec.table)


def _paths(folders: Iterable[Path], problems: list[str]) -> Iterator[Path]:
    """The `defs.yaml` files that Dagster would read too, each once."""
    seen: set[Path] = set()
    for folder in folders:
        paths = [
            path
            for name in ("defs.yaml", "defs.yml", "component.yaml")
            for path in folder.rglob(name)
            if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        ]
        for path in sorted(paths):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            above = [
                parent / "defs.yaml"
                for parent in path.parent.parents
                if parent.is_relative_to(folder) and (parent / "defs.yaml").is_file()
            ]
            if path.name != "defs.yaml":
                problems.append(f"{path}:1: the file has to be called defs.yaml; rename it")
            elif above and _has_table(above[0]):
                problems.append(
                    f"{path}:1: lies in the folder of another table ({above[0]}), where Dagster "
                    "does not look; move it beside that folder"
                )
            else:
                yield path


def _has_table(path: Path) -> bool:
    try:
        return bool(_tables(path))
    except SpecError:
        return True  # wrong in any case: its own message stands beside this one


def load_table(path: Path, line: int = 1) -> TableFile:
    """The `EmbeddedTable` of a file; among several, the first that starts at `line` or later."""
    tables = _tables(path)
    if not tables:
        raise SpecError(f"{path}:1: no document of type {COMPONENT_TYPE}")
    return _validate(next((each for each in tables if (each.line or 1) >= line), tables[-1]))


def table_from_attributes(attributes: Mapping[str, Any], folder: Path) -> TableFile:
    """A table that no file declares, for tests and scripts; `folder` holds its golden set."""
    return _validate(Document(folder / "defs.yaml", dict(attributes), None, {}))


_DAGSTERS_KEYS = ("template_vars_module", "requirements", "post_processing")
"""Dagster's component loader, which reads the package's own folder, acts on these."""


def _tables(path: Path) -> list[Document]:
    """The attributes of each table that a file declares.

    Other components are for Dagster to load; outside the package's own folder, where it does not
    look, they are refused. So is everything that can be wrong around `attributes:`.
    """
    tables = []
    shipped = path.resolve().is_relative_to(DEFS_FOLDER)
    for document in read_documents(path):
        value = document.value
        if not isinstance(value, dict) or "type" not in value:
            raise SpecError(
                f"{document.where()}: type: is missing; a document needs "
                f"`type: {COMPONENT_TYPE}` and `attributes:`"
            )
        if value["type"] != COMPONENT_TYPE:
            if shipped and _is_foreign(value["type"]):
                continue
            raise SpecError(
                f"{document.where(('type',))}: type: unknown type {value['type']!r}; "
                f"write {COMPONENT_TYPE}"
            )
        known = ["type", "attributes", *(_DAGSTERS_KEYS if shipped else ())]
        for key in value:
            if key not in known:
                raise SpecError(
                    f"{document.where((str(key),))}: {key}: "
                    + (
                        "belongs under attributes:; indent it"
                        if key in TableSpec.model_fields
                        else _unknown_key(str(key), known)
                    )
                )
        attributes = document.part("attributes")
        if not isinstance(attributes.value, dict):
            raise SpecError(
                f"{attributes.where()}: attributes: expected keys and values: table, text, "
                "embeddings …"
            )
        tables.append(attributes)
    return tables


def _is_foreign(kind: Any) -> bool:
    """Whether a type is meant to be another package's component."""
    return (
        isinstance(kind, str)
        and "." in kind
        and not kind.startswith(COMPONENT_TYPE.partition(".")[0])
        and not get_close_matches(kind, [COMPONENT_TYPE], cutoff=0.85)
    )


def _validate(document: Document) -> TableFile:
    """A table from its attributes; SpecError with every mistake in them."""
    attributes = resolve(document)
    try:
        spec = TableSpec.model_validate(attributes)
    except ValidationError as error:
        problems = [_explain(problem, document) for problem in error.errors(include_url=False)]
        raise SpecError("\n".join(dict.fromkeys(problems))) from None
    if spec.golden_set and not (document.path.parent / spec.golden_set).is_file():
        raise SpecError(
            f"{document.where(('golden_set',))}: golden_set: there is no file "
            f"{spec.golden_set!r} beside {document.path.name}; write it, or leave the key out"
        )
    _refuse_unknown_providers(spec, document)
    return TableFile(spec, document.path, document.lines.get(("table",), 1))


def _refuse_unknown_providers(spec: TableSpec, document: Document) -> None:
    from embedding_pipeline.embedders.endpoints import load_endpoints

    known = list(load_endpoints(load_settings()))
    problems = []
    for index, embedding in enumerate(spec.embeddings):
        if embedding.provider not in known:
            location = ("embeddings", index, "provider")
            problems.append(
                f"{document.where(location)}: {dotted(location)}: there is no provider "
                f"{embedding.provider!r}{_guess(embedding.provider, known)}; "
                f"known: {', '.join(known)}; declare further ones in providers.yaml"
            )
    if problems:
        raise SpecError("\n".join(problems))


_VARIANTS: dict[str, type[BaseModel]] = {
    "hash": HashPartitions,
    "column": ColumnPartitions,
    "month": MonthPartitions,
}
_PARTITIONS = "write one of {by: hash, buckets: 8}, {by: column, column: …}, {by: month, column: …}"
_EXPECTED = {
    # pydantic's error types → what to say instead
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "not_a_number": "expected a number (YAML reads yes and on as true)",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text (in quotes, where YAML would read it as something else)",
    "list_type": "expected a list",
    "model_type": "expected keys and values",
    "dict_type": "expected keys and values",
}


def _explain(problem: Any, document: Document) -> str:
    # pydantic puts the variant that it chose ("hash", "many") into the location; the file has no
    # such key
    at: tuple[str | int, ...] = problem["loc"]
    location: Location = tuple(
        part
        for index, part in enumerate(at)
        if not (index == 1 and at[0] in ("partitions", "id_column") and isinstance(part, str))
    )
    kind, context = problem["type"], problem.get("ctx", {})
    written = document.written(location)
    shown = "" if written is None or isinstance(written, dict | list) else f", not {written!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "mistake":
        location = (*location, *context["at"])
    elif kind == "extra_forbidden":
        message = _unknown_key(str(location[-1]), _known_keys(at))
    elif kind == "invalid_key":
        location = tuple(map(str, location))
        message = "a key has to be text; put it in quotes"
    elif kind == "missing":
        message = f"is missing: {_description(at)}"
    elif location == ("partitions",):
        message = _PARTITIONS
    elif location == ("nightly",):
        message = 'write {at: "03:30", timezone: Europe/Madrid}, or false' + shown
    elif location == ("id_column",) and kind == "string_type":
        message = "expected a column's name, or a list of names" + shown
    elif kind in _EXPECTED:
        message = _EXPECTED[kind] + shown
    elif kind in ("string_too_short", "too_short"):
        message = f"must not be empty: {_description(at)}"
    elif message.startswith("Input should be "):
        message = message.replace("Input should be", "must be") + shown
    return f"{document.where(location)}: {dotted(location) or 'attributes'}: {message}"


def _model(location: Location) -> type[BaseModel]:
    """The model whose key is the last part of a location as pydantic gives it."""
    if location[0] == "embeddings" and len(location) > 2:
        return EmbeddingSpec
    if location[0] == "nightly" and len(location) > 1:
        return NightlySpec
    if location[0] == "partitions" and len(location) > 2:
        return _VARIANTS[str(location[1])]
    return TableSpec


_OTHER_NAMES = {
    # what other tools call these keys
    "id": "id_column",
    "primary_key": "id_column",
    "key": "id_column",
    "text_column": "text",
    "content": "text",
    "where": "eligible",
    "filter": "eligible",
    "tenant": "tenant_column",
    "columns": "embeddings",
    "name": "column",
    "dims": "dimensions",
}


def _unknown_key(key: str, known: list[str]) -> str:
    return f"unknown key{_guess(key, known)}; known: {', '.join(known)}"


def _guess(word: str, known: list[str]) -> str:
    other = _OTHER_NAMES.get(word, "")
    close = [other] if other in known else get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _known_keys(location: Location) -> list[str]:
    return list(_model(location).model_fields)


def _description(location: Location) -> str:
    fields = _model(location).model_fields
    names = [part for part in location if part in fields]
    return (fields[str(names[-1])].description or "") if names else "see the README"


def _collisions(files: list[TableFile]) -> list[str]:
    """Names that two tables would share: in the database, or in Dagster."""
    problems: list[str] = []
    tables: dict[tuple[str, str], TableFile] = {}
    assets: dict[str, TableFile] = {}
    indexes: dict[tuple[str, str], TableFile] = {}
    for file in files:
        where = f"{file.path}:{file.line}: table"
        name = file.spec.qualified
        schema = name.schema or "public"
        first = tables.setdefault((schema, name.name), file)
        if first is not file:
            problems.append(
                f"{where}: {file.spec.table} is also declared in {first.path}:{first.line}; "
                "put all its embedding columns into one file"
            )
            continue
        for asset in _op_names(file.spec):
            first = assets.setdefault(asset, file)
            if first is not file:
                problems.append(
                    f"{where}: Dagster would call a step of {file.spec.table} {asset!r}, as one "
                    f"of {first.spec.table} ({first.path}:{first.line}); rename an embedding column"
                )
                break
        for embedding in file.spec.embeddings:
            index = short_name(name.name, embedding.column, "pending")
            first = indexes.setdefault((schema, index), file)
            if first is not file:
                problems.append(
                    f"{where}: the index {index} of {embedding.column} would have the name of one "
                    f"of {first.spec.table} ({first.path}:{first.line}); rename an embedding column"
                )
    return problems


def _op_names(spec: TableSpec) -> Iterator[str]:
    # Dagster joins an asset key's parts with `__` into the name of its step
    yield f"{spec.asset_name}__retrieval_quality"
    for embedding in spec.embeddings:
        yield f"{spec.asset_name}__{dagster_name(embedding.column)}"
        yield f"{spec.asset_name}__{dagster_name(embedding.column)}_index"
