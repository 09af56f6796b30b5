"""JSON patch (RFC 6902), JSON merge patch (RFC 7386), strategic merge patch. Pure functions:
they return a new object and leave their arguments alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

from podwire.kube.objects import Json
from podwire.lab.api.merge_keys import NOTHING, ListMap, Schema, Set
from podwire.lab.api.status import StatusError, bad_request


def json_patch(obj: Json, operations: Any) -> Json:
    """Raises StatusError: 400 for a malformed patch, 422 for one that does not fit the object."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    out: Any = copy.deepcopy(obj)
    for step in cast("list[Json]", operations):
        try:
            out = _operate(out, step)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            message = f"the server rejected our request due to an error in our request: {step}"
            raise StatusError(422, "Invalid", f"{message}: {error}") from None
    return out


def _operate(root: Any, step: Json) -> Any:
    op, path = step["op"], _pointer(step["path"])
    match op:
        case "add" | "replace":
            return _set(root, path, copy.deepcopy(step["value"]), insert=op == "add")
        case "remove":
            return _remove(root, path)
        case "move" | "copy":
            source = _pointer(step["from"])
            value = copy.deepcopy(_get(root, source))
            if op == "move":
                root = _remove(root, source)
            return _set(root, path, value, insert=True)
        case "test":
            if _get(root, path) != step["value"]:
                raise ValueError(f"testing value {step['path']} failed")
            return root
        case _:
            raise ValueError(f"unknown operation {op!r}")


def _pointer(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise ValueError(f"not a JSON pointer: {text!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _get(node: Any, path: Iterable[str]) -> Any:
    for part in path:
        node = node[_index(node, part)]
    return node


def _index(node: Any, part: str) -> Any:
    if not isinstance(node, list):
        return part
    index = int(part)
    if index < 0:
        raise IndexError(part)
    return index


def _set(root: Any, path: list[str], value: Any, *, insert: bool) -> Any:
    if not path:
        return value
    node, last = _get(root, path[:-1]), path[-1]
    if isinstance(node, list):
        items = cast("list[Any]", node)
        if not insert:
            items[_index(node, last)] = value
            return root
        index = len(items) if last == "-" else _index(node, last)
        if index > len(items):
            raise IndexError(last)
        items.insert(index, value)
    else:
        if not insert and last not in node:
            raise KeyError(f"replace operation does not apply: doc is missing key: {last}")
        node[last] = value
    return root


def _remove(root: Any, path: list[str]) -> Any:
    node = _get(root, path[:-1])
    del node[_index(node, path[-1])]
    return root


def merge_patch(obj: Any, patch: Any) -> Any:
    """RFC 7386: null removes, maps merge, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    out: Json = dict(cast("Json", obj)) if isinstance(obj, dict) else {}
    for key, value in cast("Json", patch).items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge_patch(out.get(key), value)
    return out


# --- strategic merge -----------------------------------------------------------------------------

_ORDER, _DELETE_PLAIN = "$setElementOrder/", "$deleteFromPrimitiveList/"


def strategic_merge(obj: Json, patch: Json, schema: Schema) -> Json:
    """The kubectl patch format with its directives (``$patch``, ``$retainKeys``, …).

    Source: sig-api-machinery, strategic-merge-patch.md. Raises StatusError (400).
    """
    match patch.get("$patch"):
        case None | "merge":
            pass
        case "replace":
            return {key: value for key, value in patch.items() if key != "$patch"}
        case "delete":
            return {}
        case other:
            raise bad_request(f"unknown patch type: {other}")
    out = dict(obj)
    if (retain := patch.get("$retainKeys")) is not None:
        out = {key: value for key, value in out.items() if key in retain}
    for key, value in patch.items():
        if key.startswith("$"):
            if key.startswith(_DELETE_PLAIN):
                name = key.removeprefix(_DELETE_PLAIN)
                have: list[Any] = out.get(name) or []
                out[name] = [item for item in have if item not in value]
        elif value is None:
            out.pop(key, None)
        else:
            out[key] = _merge_value(out.get(key), value, schema.get(key, NOTHING))
    for key, order in patch.items():
        name = key.removeprefix(_ORDER)
        if name != key and isinstance(out.get(name), list):
            out[name] = _ordered(out[name], order, schema.get(name, NOTHING))
    return out


def _merge_value(old: Any, new: Any, how: Schema | ListMap | Set) -> Any:
    if isinstance(new, dict):
        base = cast("Json", old) if isinstance(old, dict) else {}
        return strategic_merge(base, cast("Json", new), how if isinstance(how, dict) else NOTHING)
    if isinstance(new, list):
        items = cast("list[Any]", new)
        base_items: list[Any] = cast("list[Any]", old) if isinstance(old, list) else []
        if isinstance(how, ListMap):
            return _merge_list(base_items, items, how)
        if isinstance(how, Set):
            return base_items + [item for item in items if item not in base_items]
        return items
    return new


def _merge_list(old: list[Json], patch: list[Json], how: ListMap) -> list[Json]:
    key = how.keys[0]
    if any(item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
    out: list[Json] = list(old)
    for item in patch:
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        at = next((i for i, have in enumerate(out) if have.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            out = [have for have in out if have.get(key) != item[key]]
        elif at is None:
            out.append(strategic_merge({}, item, how.item))
        else:
            out[at] = strategic_merge(out[at], item, how.item)
    return out


def _ordered(items: list[Any], order: list[Any], how: Schema | ListMap | Set) -> list[Any]:
    """Items named by the directive in its order; the server's own ones keep their places."""

    def identity(item: Any) -> Any:
        return item.get(how.keys[0]) if isinstance(how, ListMap) else item

    wanted = [identity(item) for item in order]
    places = [i for i, item in enumerate(items) if identity(item) in wanted]
    named = sorted((items[i] for i in places), key=lambda item: wanted.index(identity(item)))
    out = list(items)
    for place, item in zip(places, named, strict=True):
        out[place] = item
    return out
