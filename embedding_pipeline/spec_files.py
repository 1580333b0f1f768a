"""Reading `defs/<table>/defs.yaml`: templates, types, and errors that name file and line."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from embedding_pipeline.errors import SpecError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import (
    ColumnPartitions,
    EmbeddingSpec,
    HashPartitions,
    MonthPartitions,
    TableSpec,
)

COMPONENT_TYPE = "embedding_pipeline.EmbeddedTable"
DEFS_FOLDER = Path(__file__).resolve().parent / "defs"

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class TableFile:
    """A table's specification and the file that it came from."""

    spec: TableSpec
    path: Path

    @property
    def golden_set_path(self) -> Path | None:
        """Where the golden set lies; None for a table without one."""
        return self.path.parent / self.spec.golden_set if self.spec.golden_set else None


def template_scope() -> dict[str, Any]:
    """What `{{ … }}` in a table's YAML may name.

    `env`: environment variables. `embedding_api.provider` and `embedding_api.model`: the model of
    the shipped tables' 1536-dim columns, which `USE_EMBEDDING_API=true` alone decides (a key that
    merely happens to be set spends nothing).
    """
    if load_settings().use_embedding_api:
        api = {"provider": "openai", "model": "text-embedding-3-small"}
    else:
        api = {"provider": "local", "model": "all-minilm-l6-v2-layers"}
    return {"env": _Environment(os.environ), "embedding_api": api}


class _Environment(Mapping[str, str]):
    """`{{ env.NAME }}`; only variables that are named are ever read."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)


def load_table_files(folder: Path = DEFS_FOLDER) -> list[TableFile]:
    """Every `EmbeddedTable` below a folder, sorted by table name.

    Raises SpecError for the first mistake: file, line, key and remedy.
    """
    files: list[TableFile] = []
    for path in sorted(folder.glob("**/defs.yaml")):
        for document in _documents(path):
            if document.type == COMPONENT_TYPE:
                files.append(TableFile(_validate(document), path))
    _refuse_collisions(files)
    return sorted(files, key=lambda file: file.spec.table)


def load_table(path: Path, attributes: dict[str, Any] | None = None) -> TableFile:
    """The one `EmbeddedTable` of a file; `attributes` picks among several documents."""
    documents = [item for item in _documents(path) if item.type == COMPONENT_TYPE]
    if attributes is not None and len(documents) > 1:
        documents = [
            item for item in documents if item.attributes.get("table") == attributes.get("table")
        ]
    if not documents:
        raise SpecError(f"{path}: no document of type {COMPONENT_TYPE}")
    return TableFile(_validate(documents[0]), path)


@dataclass(frozen=True)
class _Document:
    path: Path
    type: str
    attributes: dict[str, Any]
    lines: dict[Location, int]
    """Line numbers (from 1) of every key and item, by its path inside `attributes`."""


def _documents(path: Path) -> Iterator[_Document]:
    try:
        text = path.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                value = loader.construct_document(node)
                if not isinstance(value, dict) or "type" not in value:
                    line = node.start_mark.line + 1
                    raise SpecError(
                        f"{path}:{line}: a document needs `type: {COMPONENT_TYPE}` and"
                        " `attributes:`"
                    )
                attributes = value.get("attributes") or {}
                if value["type"] == COMPONENT_TYPE and not isinstance(attributes, dict):
                    raise SpecError(f"{path}: attributes: expected keys and values")
                yield _Document(path, str(value["type"]), attributes, _lines(node))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _lines(node: yaml.Node) -> dict[Location, int]:
    lines: dict[Location, int] = {}

    def walk(node: yaml.Node, location: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*location, str(key.value))
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*location, index)] = item.start_mark.line + 1
                walk(item, (*location, index))

    walk(node, ())
    return {
        location[1:]: line for location, line in lines.items() if location[:1] == ("attributes",)
    }


def _validate(document: _Document) -> TableSpec:
    attributes = _render(document.attributes, (), document)
    try:
        spec = TableSpec.model_validate(attributes)
    except ValidationError as error:
        problems = [
            _explain(problem, document)
            for problem in error.errors(include_url=False, include_context=False)
        ]
        raise SpecError("\n".join(dict.fromkeys(problems))) from None
    try:
        spec.qualified  # noqa: B018 - parsing it is the check
    except ValueError as error:
        raise SpecError(f"{_where(document, ('table',))}: table: {error}") from None
    if spec.golden_set and not (document.path.parent / spec.golden_set).is_file():
        raise SpecError(
            f"{_where(document, ('golden_set',))}: golden_set: there is no file "
            f"{spec.golden_set!r} beside {document.path.name}; write it, or leave the key out"
        )
    return spec


def _render(value: Any, location: Location, document: _Document) -> Any:
    """Resolve `{{ … }}` in every string; what stays text stays text, numbers become numbers."""
    if isinstance(value, dict):
        return {key: _render(item, (*location, str(key)), document) for key, item in value.items()}
    if isinstance(value, list):
        return [_render(item, (*location, i), document) for i, item in enumerate(value)]
    if not (isinstance(value, str) and "{{" in value):
        return value
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    try:
        environment = SandboxedEnvironment(undefined=StrictUndefined)
        return environment.from_string(value).render(template_scope())
    except TemplateError as error:
        name = ".".join(map(str, location))
        raise SpecError(
            f"{_where(document, location)}: {name}: {value!r} cannot be resolved: {error}; "
            "set the environment variable, or write the value itself"
        ) from None


def _where(document: _Document, location: Location) -> str:
    """File and line of the innermost part of a location that the file has."""
    for length in range(len(location), 0, -1):
        line = document.lines.get(location[:length])
        if line is not None:
            return f"{document.path}:{line}"
    return str(document.path)


_VARIANTS: dict[str, type[BaseModel]] = {
    "hash": HashPartitions,
    "column": ColumnPartitions,
    "month": MonthPartitions,
}


def _explain(problem: Any, document: _Document) -> str:
    # pydantic puts the discriminator's value ("hash") into the location; the file has no such key
    location: Location = tuple(
        part
        for index, part in enumerate(problem["loc"])
        if not (part in _VARIANTS and index and problem["loc"][index - 1] == "partitions")
    )
    # a value that may be text or a list gives one problem for each; name the key, not the branch
    location = tuple(part for part in location if not _is_branch(part))
    name = ".".join(map(str, location)) or "attributes"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"])
        close = get_close_matches(str(location[-1]), known, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        message = f"unknown key{guess}; known: {', '.join(known)}"
    elif problem["type"] == "missing":
        message = "is required; see the README, “Adding your own table”"
    elif problem["type"].startswith("union_tag"):
        message = (
            "write one of {by: hash, buckets: 8}, {by: column, column: …}, {by: month, column: …}"
        )
    return f"{_where(document, location)}: {name}: {message}"


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith(("constrained-str", "list[", "function-"))


def _known_keys(location: Location) -> list[str]:
    if location[0] == "embeddings":
        return list(EmbeddingSpec.model_fields)
    if location[0] == "partitions":
        return list(_VARIANTS[str(location[1])].model_fields) if len(location) > 2 else ["by"]
    return list(TableSpec.model_fields)


def _refuse_collisions(files: list[TableFile]) -> None:
    seen: dict[tuple[str, str], TableFile] = {}
    for file in files:
        name = file.spec.qualified
        key = (name.schema or "public", name.name)
        if key in seen:
            raise SpecError(
                f"{file.path}: table: {file.spec.table} is also declared in {seen[key].path}; "
                "put all its embedding columns into one file"
            )
        seen[key] = file
