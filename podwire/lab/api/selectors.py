"""Label and field selectors, in the query's text form and in the objects' structured form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

from podwire.kube.objects import Json
from podwire.lab import tree
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import bad_request

Labels: TypeAlias = Mapping[str, str]
Matcher: TypeAlias = Callable[[Labels], bool]

_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^()]*)\)$")
_EQUALITY = re.compile(r"^([^\s=!]+)\s*(==|=|!=)\s*(\S*)$")
_KEY = re.compile(r"^!?\s*[A-Za-z0-9][-A-Za-z0-9_./]*$")


@lru_cache(maxsize=1024)
def parse_labels(text: str) -> Matcher:
    """The predicate of ``a=b,c!=d,e in (x,y),f notin (z),g,!h``. Raises StatusError (400)."""
    terms = [_term(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return lambda labels: all(term(labels) for term in terms)


def _term(text: str) -> Matcher:
    if found := _SET.match(text):
        key, operator, listed = found.groups()
        values = {value.strip() for value in listed.split(",")}
        return requirement(key, "In" if operator == "in" else "NotIn", values)
    if found := _EQUALITY.match(text):
        key, operator, value = found.groups()
        return requirement(key, "NotIn" if operator == "!=" else "In", {value})
    if _KEY.match(text):
        absent = text.startswith("!")
        return requirement(text.lstrip("! "), "DoesNotExist" if absent else "Exists", set())
    raise bad_request(f'unable to parse requirement: "{text}" is no label selector')


def requirement(key: str, operator: str, values: set[str]) -> Matcher:
    """One requirement; NotIn holds where the key is missing, as the API defines it."""
    match operator:
        case "In":
            return lambda labels: labels.get(key) in values
        case "NotIn":
            return lambda labels: labels.get(key) not in values
        case "Exists":
            return lambda labels: key in labels
        case _:
            return lambda labels: key not in labels


def label_selector(selector: Json | None) -> Matcher:
    """The predicate of a meta/v1 LabelSelector; None selects nothing, ``{}`` everything."""
    if selector is None:
        return lambda labels: False
    equal: dict[str, str] = tree.mapping(selector, "matchLabels")
    terms = [
        requirement(term["key"], term["operator"], set(tree.texts(term, "values")))
        for term in tree.mappings(selector, "matchExpressions")
    ]
    pairs = list(equal.items())
    return lambda labels: (
        all(labels.get(k) == v for k, v in pairs) and all(term(labels) for term in terms)
    )


_FIELDS: dict[str, set[str]] = {
    "Pod": {
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    },
    "Node": {"spec.unschedulable"},
    "Namespace": {"status.phase"},
    "Service": {"spec.clusterIP", "spec.type"},
    "Secret": {"type"},
    "Job": {"status.successful"},
    "ReplicaSet": {"status.replicas"},
    "Event": {
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.fieldPath",
        "reason",
        "type",
        "source",
        "reportingComponent",
    },
}


def parse_fields(resource: ApiResource, text: str) -> Callable[[Json], bool]:
    """The predicate of ``spec.nodeName=a,status.phase!=Running``. Raises StatusError (400)."""
    allowed = _FIELDS.get(resource.kind, set()) | {"metadata.name", "metadata.namespace"}
    terms: list[tuple[list[str], str, bool]] = []
    for part in filter(None, text.split(",")):
        found = _EQUALITY.match(part.strip())
        if not found:
            raise bad_request(f'invalid selector: "{part}"; can\'t understand "{part}"')
        path, operator, value = found.groups()
        if path not in allowed:
            raise bad_request(f"field label not supported: {path}")
        terms.append((path.split("."), value, operator != "!="))
    return lambda obj: all((_field(obj, path) == value) == equal for path, value, equal in terms)


def _field(obj: Any, path: list[str]) -> str:
    for part in path:
        obj = obj.get(part) if isinstance(obj, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(obj, bool):
        return "true" if obj else "false"
    return "" if obj is None else str(obj)  # pyright: ignore[reportUnknownArgumentType]
