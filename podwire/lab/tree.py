"""Reading JSON objects of the API: what is missing, null or of another shape reads as empty."""

from __future__ import annotations

from typing import Any, cast

from podwire.kube.objects import Json


def value(obj: Json, *path: str) -> Any:
    """The member at the end of `path`, or None."""
    found: Any = obj
    for name in path:
        if not isinstance(found, dict):
            return None
        found = cast("Json", found).get(name)
    return found


def mapping(obj: Json, *path: str) -> Json:
    """The object at the end of `path`; not to be changed."""
    found = value(obj, *path)
    return cast("Json", found) if isinstance(found, dict) else {}


def mappings(obj: Json, *path: str) -> list[Json]:
    """The list of objects at the end of `path`; not to be changed."""
    found = value(obj, *path)
    if not isinstance(found, list):
        return []
    return [cast("Json", item) for item in cast("list[Any]", found) if isinstance(item, dict)]


def texts(obj: Json, *path: str) -> list[str]:
    """The list of strings at the end of `path`; not to be changed."""
    found = value(obj, *path)
    return cast("list[str]", found) if isinstance(found, list) else []


def text(obj: Json, *path: str) -> str:
    """The string at the end of `path`, or ``""``."""
    found = value(obj, *path)
    return found if isinstance(found, str) else ""
