"""Label selectors, compiled once and matched often.

Semantics: apimachinery `labels.Requirement.Matches`. `NotIn` and `DoesNotExist` match where the key
is missing; `matchLabels: {k: ""}` needs the key to be there with an empty value; every requirement
must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from podwire.kube.objects import LabelSelector

Labels: TypeAlias = Mapping[str, str]
Report: TypeAlias = Callable[[str, str], None]
"""Called with the field path and the sentence that says what is wrong with it."""

NO_LABELS: Labels = MappingProxyType({})
NAMESPACE_NAME = "kubernetes.io/metadata.name"


class Requirement(NamedTuple):
    """One of matchExpressions. `operator` is one of the API's four."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Labels) -> bool:
        value = labels.get(self.key)
        if self.operator == "In":
            return value is not None and value in self.values
        if self.operator == "NotIn":
            return value is None or value not in self.values
        return (value is not None) == (self.operator == "Exists")


class Selector(NamedTuple):
    """All of `equals` and all of `requirements`. The empty selector matches everything."""

    equals: tuple[tuple[str, str], ...] = ()
    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Labels) -> bool:
        for key, value in self.equals:
            if labels.get(key) != value:
                return False
        return all(requirement.matches(labels) for requirement in self.requirements)

    def __str__(self) -> str:
        parts = [f"{key}={value}" for key, value in self.equals]
        for key, operator, values in self.requirements:
            listed = ",".join(sorted(values))
            parts.append(f"{key} {operator}" + (f" ({listed})" if values else ""))
        return ", ".join(parts) or "(all)"


EVERYTHING = Selector()
_OPERATORS = {"In": True, "NotIn": True, "Exists": False, "DoesNotExist": False}


def compile_selector(source: LabelSelector, field: str, report: Report) -> Selector | None:
    """The compiled selector; None, and a report by field, where it has no meaning."""
    if not source.match_expressions:  # nearly all
        labels = source.match_labels
        return Selector(tuple(sorted(labels.items()))) if labels else EVERYTHING
    equals = dict(source.match_labels or {})
    requirements: list[Requirement] = []
    sound = True
    for i, (key, operator, values) in enumerate(
        (r.key, r.operator, r.values or []) for r in source.match_expressions or []
    ):
        where = f"{field}.matchExpressions[{i}]"
        if operator not in _OPERATORS:
            report(f"{where}.operator", f"unknown operator {operator!r}")
            sound = False
        elif not key:
            report(f"{where}.key", "a key is required")
            sound = False
        elif _OPERATORS[operator] != bool(values):
            needed = "needs" if _OPERATORS[operator] else "takes no"
            report(f"{where}.values", f"{operator} {needed} values")
            sound = False
        elif operator == "In" and len(values) == 1 and equals.get(key, values[0]) == values[0]:
            equals[key] = values[0]
        else:
            requirements.append(Requirement(key, operator, frozenset(values)))
    return Selector(tuple(sorted(equals.items())), tuple(requirements)) if sound else None
