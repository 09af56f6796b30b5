"""The last known objects on disk: an agent that starts while the API is away serves these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from podwire.kube.objects import Resource
from podwire.kube.store import Kind, Store


def encode(store: Store, kinds: Sequence[Kind]) -> bytes:
    """The file's content; quick, beside what the disk takes."""
    return msgspec.json.encode({kind.__name__: list(store.all(kind).values()) for kind in kinds})


def write(content: bytes, path: Path) -> None:
    """Replace the file, which is always whole, the old one or the new one; wait for the disk."""
    part = path.with_suffix(".part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(store: Store, kinds: Sequence[Kind], path: Path) -> bool:
    """Fill `store`; false when there is no file or it is of no use. Kinds it lacks stay empty."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        found: dict[Kind, list[Resource]] = {
            kind: msgspec.json.decode(document[kind.__name__], type=list[kind])
            for kind in kinds
            if kind.__name__ in document
        }
    except (OSError, msgspec.DecodeError):
        return False
    for kind, objects in found.items():
        store.replace(kind, objects)
    return True
