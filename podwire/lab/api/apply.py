"""Server-side apply: merge, remove what the manager gave up, record who owns what.

Conflicts between managers are not judged: the last one wins and fields may have several owners.
Fields are kept in the API's own form (FieldsV1). Pure functions.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import msgspec

from podwire.kube.objects import Json
from podwire.lab.api.merge_keys import NOTHING, ListMap, Schema, Set

_NOT_OWNED = {"apiVersion", "kind"}
_METADATA_OWNED = {"labels", "annotations", "ownerReferences", "finalizers"}
_KEY_DEFAULTS = {"protocol": "TCP"}


def apply(current: Json, applied: Json, schema: Schema, manager: str, time: str) -> Json:
    """`current` after `manager` applied its configuration; `time` goes into managedFields.

    With ``{}`` for `current` it is the object that a first apply creates.
    """
    owned = fields_of(applied, schema)
    entries: list[Json] = current.get("metadata", {}).get("managedFields") or []
    others = [entry for entry in entries if not _is_apply_of(entry, manager)]
    left: Json = current
    for entry in entries:
        if _is_apply_of(entry, manager):
            given_up = _minus(entry.get("fieldsV1") or {}, owned)
            for other in others:
                given_up = _minus(given_up, other.get("fieldsV1") or {})
            left = _without(left, given_up, schema)
    out: Json = _merged(left, applied, schema)
    entry = {
        "manager": manager,
        "operation": "Apply",
        "apiVersion": applied.get("apiVersion", ""),
        "time": time,
        "fieldsType": "FieldsV1",
        "fieldsV1": owned,
    }
    out["metadata"] = {**out.get("metadata", {}), "managedFields": [*others, entry]}
    return out


def _is_apply_of(entry: Json, manager: str) -> bool:
    return entry.get("manager") == manager and entry.get("operation") == "Apply"


def fields_of(obj: Json, schema: Schema) -> Json:
    """The FieldsV1 of everything that `obj` says."""
    out: Json = {}
    for name, value in obj.items():
        if name in _NOT_OWNED:
            continue
        if name == "metadata":
            value = {key: value[key] for key in value if key in _METADATA_OWNED}
            if not value:
                continue
        out[f"f:{name}"] = _fields(value, schema.get(name, NOTHING))
    return out


def _fields(value: Any, how: Schema | ListMap | Set) -> Json:
    if isinstance(value, dict):
        schema = how if isinstance(how, dict) else NOTHING
        items = cast("Json", value).items()
        return {f"f:{name}": _fields(item, schema.get(name, NOTHING)) for name, item in items}
    if isinstance(value, list):
        if isinstance(how, ListMap):
            keyed = cast("list[Json]", value)
            return {_key(item, how): {".": {}, **_fields(item, how.item)} for item in keyed}
        if isinstance(how, Set):
            return {f"v:{_text(item)}": {} for item in cast("list[Any]", value)}
    return {}


def _key(item: Json, how: ListMap) -> str:
    return f"k:{_text(_identity(item, how))}"


def _identity(item: Json, how: ListMap) -> Json:
    values = {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in sorted(how.keys)}
    return {key: value for key, value in values.items() if value is not None}


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _merged(old: Any, new: Any, how: Schema | ListMap | Set) -> Any:
    if isinstance(new, dict):
        schema = how if isinstance(how, dict) else NOTHING
        out: Json = dict(cast("Json", old)) if isinstance(old, dict) else {}
        for name, value in cast("Json", new).items():
            if value is None:
                out.pop(name, None)
            else:
                out[name] = _merged(out.get(name), value, schema.get(name, NOTHING))
        return out
    if isinstance(new, list) and isinstance(old, list):
        if isinstance(how, ListMap):
            return _merged_list(cast("list[Json]", old), cast("list[Json]", new), how)
        if isinstance(how, Set):
            have = cast("list[Any]", old)
            return have + [item for item in cast("list[Any]", new) if item not in have]
    return copy.deepcopy(cast("Any", new))


def _merged_list(old: list[Json], new: list[Json], how: ListMap) -> list[Json]:
    out = list(old)
    places = {_key(item, how): place for place, item in enumerate(old)}
    for item in new:
        place = places.get(_key(item, how))
        if place is None:
            out.append(copy.deepcopy(item))
        else:
            out[place] = _merged(out[place], item, how.item)
    return out


def _minus(fields: Json, others: Json) -> Json:
    """The leaves of `fields` that `others` does not name."""
    out: Json = {}
    for name, below in fields.items():
        if name not in others:
            out[name] = below
        elif below and (rest := _minus(below, others[name])):
            out[name] = rest
    return out


def _without(value: Any, fields: Json, how: Schema | ListMap | Set) -> Any:
    """`value` without the named leaves; a map that becomes empty by it goes too."""
    if isinstance(value, dict):
        schema = how if isinstance(how, dict) else NOTHING
        out: Json = dict(cast("Json", value))
        for name, below in fields.items():
            key = name[2:]
            if key not in out or not name.startswith("f:"):
                continue
            rest = _without(out[key], below, schema.get(key, NOTHING)) if below else None
            if rest:
                out[key] = rest
            else:
                del out[key]
        return out
    if isinstance(value, list):
        if isinstance(how, ListMap):
            return _without_items(cast("list[Json]", value), fields, how)
        if isinstance(how, Set):
            return [i for i in cast("list[Any]", value) if f"v:{_text(i)}" not in fields]
    return cast("Any", value)


def _without_items(items: list[Json], fields: Json, how: ListMap) -> list[Json]:
    out: list[Json] = []
    for item in items:
        below = fields.get(_key(item, how))
        if below is None:
            out.append(item)
        elif "." not in below:  # somebody still owns the item itself
            out.append(_without(item, below, how.item))
    return out
