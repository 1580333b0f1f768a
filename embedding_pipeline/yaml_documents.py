"""YAML documents that know on which line each key stands, so that errors can say so."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from embedding_pipeline.errors import SpecError

Location = tuple[str | int, ...]
"""Keys and list positions from a document's root to a value."""


@dataclass(frozen=True)
class Document:
    """One document of a YAML file, or a part of one."""

    path: Path
    value: Any
    line: int | None
    """Where it starts; None for one that no file holds."""
    lines: dict[Location, int]
    """The line (from 1) of every key and item."""

    def where(self, location: Location = ()) -> str:
        """File and line of the innermost part of a location that the file has."""
        for length in range(len(location), 0, -1):
            line = self.lines.get(location[:length])
            if line is not None:
                return f"{self.path}:{line}"
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"

    def written(self, location: Location) -> Any:
        """What the file says at a location; None where it says nothing."""
        value = self.value
        for part in location:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def part(self, key: str) -> "Document":
        """What stands under a key of the root, as a document of its own."""
        return Document(
            self.path,
            self.value.get(key),
            self.lines.get((key,), self.line),
            {at[1:]: line for at, line in self.lines.items() if at[0] == key and len(at) > 1},
        )


def dotted(location: Location) -> str:
    """A location as messages show it: `embeddings.1.model`."""
    return ".".join(map(str, location))


def read_documents(path: Path, *, may_be_empty: bool = False) -> Iterator[Document]:
    """The documents of a file. SpecError with file and line for what is not UTF-8 or not YAML,
    and for what PyYAML would let pass: a key that is written twice, an empty file (unless it may
    be empty: no documents then)."""
    text = _text(path)
    empty = True
    try:
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                assert node is not None
                empty = False
                lines = _lines(path, node)  # before merge keys (`<<`) are replaced
                yield Document(path, _construct(path, node, loader), _line(node), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        if error.context and error.context_mark and mark and error.context_mark.line < mark.line:
            context = f" ({error.context}, which begins in line {error.context_mark.line + 1})"
        line = mark.line + 1 if mark else 1
        raise SpecError(f"{path}:{line}: not valid YAML: {error.problem}{context}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise SpecError(
            f"{path}:{line}: not valid YAML: it does not allow the character "
            f"U+{int(error.character):04X}; remove it"
        ) from None
    if empty and not may_be_empty:
        raise SpecError(f"{path}:1: the file is empty")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecError(
            f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None


def _construct(path: Path, node: yaml.Node, loader: yaml.SafeLoader) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # PyYAML's own conversion, as of `description: 2025-02-30`
        raise SpecError(
            f"{path}:{_unconvertible(node) or _line(node)}: not valid YAML: {error}; "
            "put the value in quotes"
        ) from None


def _unconvertible(node: yaml.Node) -> int | None:
    """The line of the first value that PyYAML takes for a date or a number and cannot read."""
    if isinstance(node, yaml.ScalarNode):
        try:
            yaml.SafeLoader("").construct_document(node)
        except ValueError:
            return _line(node)
        return None
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    return next((line for part in parts if (line := _unconvertible(part))), None)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _lines(path: Path, root: yaml.Node) -> dict[Location, int]:
    lines: dict[Location, int] = {}
    around: list[yaml.Node] = []

    def walk(node: yaml.Node, location: Location) -> None:
        if node in around:
            raise SpecError(
                f"{path}:{lines[location]}: {dotted(location)}: an alias stands inside what it "
                "names; write the value itself"
            )
        around.append(node)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*location, str(key.value))
                if here in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise SpecError(
                        f"{path}:{_line(key)}: {key.value}: is written twice, first in line "
                        f"{lines[here]}; leave one of them"
                    )
                lines[here] = _line(key)
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*location, index)] = _line(item)
                walk(item, (*location, index))
        around.pop()

    walk(root, ())
    return lines
