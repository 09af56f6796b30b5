"""Manifests: YAML or JSON files, directories and standard input, to objects. Pure but for reading.

Every file is read and checked before anything of any is used, so that a bad one changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import yaml

from podwire.errors import ConfigError

Json: TypeAlias = dict[str, Any]

SUFFIXES = (".yaml", ".yml", ".json")
_FIRST = ("Namespace", "CustomResourceDefinition")  # others may need them
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast


@dataclass(frozen=True)
class Manifest:
    """One object and where it was written."""

    obj: Json
    source: str
    document: int

    @property
    def kind(self) -> str:
        return str(self.obj["kind"])

    def __str__(self) -> str:
        meta = self.obj["metadata"]
        namespace = f"{meta['namespace']}/" if meta.get("namespace") else ""
        return f"{self.kind} {namespace}{meta.get('name') or meta.get('generateName')}"


def read(sources: Iterable[str]) -> list[Manifest]:
    """The objects of files, directories (not below) and ``-``, those that others need first.

    Raises ConfigError naming the file and the number of the document, from 1.
    """
    found: list[Manifest] = []
    for source in sources:
        for name, text in _texts(source):
            found += parse(text, name)
    return sorted(found, key=lambda manifest: manifest.kind not in _FIRST)


def _texts(source: str) -> Iterator[tuple[str, str]]:
    if source == "-":
        yield "standard input", sys.stdin.read()
        return
    path = Path(source)
    try:
        paths = (
            sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
        )
        if not paths:
            raise ConfigError(f"{source}: no {', '.join(SUFFIXES)} files in this directory")
        for file in paths:
            yield str(file), file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{source}: cannot read: {reason}") from None


def parse(text: str, source: str) -> list[Manifest]:
    """The objects of one text; Lists are taken apart. Raises ConfigError."""
    found: list[Manifest] = []
    number = 0
    try:
        for document in yaml.load_all(text, _LOADER):
            number += 1
            if document is not None:
                found += [Manifest(obj, source, number) for obj in _objects(document)]
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}, document {number + 1}: {_say(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}, document {number}: {error}") from None
    except (ValueError, RecursionError) as error:  # a date that is none, a bottomless nesting
        raise ConfigError(f"{source}, document {number + 1}: {error}") from None
    return found


def _say(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _objects(document: object) -> Sequence[Json]:
    if not isinstance(document, dict):
        raise ConfigError(f"not a Kubernetes object but a {_type(document)}")
    obj = cast(Json, document)
    for name in ("apiVersion", "kind"):
        if not isinstance(obj.get(name), str) or not obj[name]:
            raise ConfigError(f"not a Kubernetes object: {name} is missing")
    if obj["kind"].endswith("List") and "items" in obj:
        items = obj["items"]
        if not isinstance(items, list):
            raise ConfigError(f"items of a {obj['kind']} is not a list")
        return [inner for item in cast("list[object]", items) for inner in _objects(item)]
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict):
        raise ConfigError(f"{obj['kind']}: metadata is missing")
    known = cast(Json, metadata)
    if not any(isinstance(known.get(n), str) and known[n] for n in ("name", "generateName")):
        raise ConfigError(f"{obj['kind']}: metadata.name is missing")
    return [obj]


def _type(value: object) -> str:
    names = {"str": "text", "int": "number", "float": "number", "bool": "boolean"}
    name = type(value).__name__
    return names.get(name, name)
