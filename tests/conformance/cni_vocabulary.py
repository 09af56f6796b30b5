"""Which words a case may use. One that the runner does not know fails its case: nothing is
silently left unchecked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Kept by namespace; each may be negated by `_absent` or `_lacks`, on the key or on the namespace.
STATE = (
    "links", "addresses", "routes", "neighbours", "fdb", "ip_rules", "bridge_vlans", "bridge_port",
    "qdiscs", "sysctl",
)  # fmt: skip
_NEGATIONS = ("_absent", "_lacks", "_not")
_JUDGED = {
    "exit", "stdout", "result", "result_shape", "error", "names", "details_name", "rules", "files",
    "probes", "no_residue", "same", "distinct_addresses", "distinct_leases", "leases", "latency",
    "conntrack", "qdisc_rates", "repaired_within_s", "withdrawn_for",
}  # fmt: skip
_REMARKS = {"note", "notes", "reference", "reference_only", "why"}
_CASE = {
    "id", "title", "kind", "plugin", "cni_version", "requires", "chained", "config",
    "reference_ipam", "env", "steps", "expect", "alternatives", "reference_deviates",
    "project_setup", "reference_only", "notes", "note", "checked", "source", "schema", "tags",
}  # fmt: skip
_VERBS = {"call", "host", "pod", "host_root", "write", "remove", "save", "runtime", "action"}
_STEP = _VERBS | {
    "env", "config", "config_replace", "reference_ipam", "plugin", "stdin", "as", "prev",
    "parallel", "expect", "content", "of", "executable", "reference_only", "note", "notes",
    "pod2", "pod3",
}  # fmt: skip
_ERROR = {
    "spec_code", "reference_code", "reference_message", "accept_from_others", "names",
    "details_name", "note",
}  # fmt: skip


def unknown_words(document: dict[str, Any]) -> Iterator[str]:
    """What of a case the runner would not look at, one sentence each."""
    yield from _strange(document, _CASE, "the case")
    yield from _in_expect(document.get("expect"), "expect")
    for number, step in enumerate(document["steps"], 1):
        where = f"step {number}"
        if not isinstance(step, dict):
            yield f"{where} is no object"
            continue
        yield from _strange(step, _STEP, where)
        if not _VERBS & step.keys() and not {"pod2", "pod3"} & step.keys():
            yield f"{where} does nothing"
        yield from _in_expect(step.get("expect"), f"{where}: expect")
    alternatives = document.get("alternatives") or []
    for each in alternatives if isinstance(alternatives, list) else [alternatives]:
        yield from _strange(each, {"step", "expect", "why", "note"}, "an alternative")
        yield from _in_expect(each.get("expect"), "alternatives: expect")


def _strange(found: Any, known: set[str], where: str) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where} is no object"
        return
    for key in found:
        if key not in known:
            yield f"the runner does not know {key!r} of {where}"


def _in_expect(expect: Any, where: str) -> Iterator[str]:
    if expect is None:
        return
    known = {*_JUDGED, *_REMARKS, *STATE, *(s + n for s in STATE for n in _NEGATIONS)}
    yield from _strange(expect, known, where)
    if isinstance(expect, dict) and expect.get("error") is not None:
        yield from _strange(expect["error"], _ERROR, f"{where}.error")


def by_namespace(expect: dict[str, Any]) -> dict[str, Any]:
    """`links_absent: {pod: …}` written as `links: {pod_absent: …}`, like most cases do."""
    plain = dict(expect)
    for state in STATE:
        for negation in _NEGATIONS:
            value = plain.pop(state + negation, None)
            if value is None:
                continue
            merged = plain.get(state, {})
            merged = dict(merged) if isinstance(merged, dict) else {"host": merged}
            spread = value if isinstance(value, dict) else {"host": value}
            merged.update({f"{key}{negation}": each for key, each in spread.items()})
            plain[state] = merged
    return plain


def split(key: str) -> tuple[str, bool]:
    """A key without its negation, and whether it had one."""
    for negation in _NEGATIONS:
        if key.endswith(negation):
            return key.removesuffix(negation), True
    return key, False
