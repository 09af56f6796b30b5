"""Compares what a case expects with what a call answered.

Every function yields one sentence per difference.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.conformance.cni_live import normal
from tests.conformance.cni_shape import misfits

Done = subprocess.CompletedProcess[str]


def output(
    expect: dict[str, Any], done: Done, previous: Any, results: dict[str, Any]
) -> Iterator[str]:
    """Exit status, standard output, result and error.

    `previous` is the call's prevResult, `results` what a case kept by name.
    """
    wanted, error = expect.get("exit"), expect.get("error")
    either = error is not None and wanted == 0  # a case that accepts both
    if wanted == 0 and done.returncode and not either:
        yield f"exit {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}"
    if wanted == "nonzero" and done.returncode == 0:
        yield f"exit 0, an error was expected: {done.stdout.strip()}"
    if isinstance(wanted, int) and wanted and done.returncode != wanted:
        yield f"exit {done.returncode}, not {wanted}"
    if wanted is not None and wanted != "nonzero" and not isinstance(wanted, int):
        yield f"the runner does not know exit: {wanted!r}"
    yield from _stdout(expect.get("stdout"), done)
    if "result" in expect and done.returncode == 0:
        yield from _result(expect["result"], _json(done.stdout), previous, results)
    if "result_shape" in expect and done.returncode == 0:
        yield from misfits(_json(done.stdout), expect["result_shape"])
    if error is not None and (done.returncode or not either):
        yield from _error(error, expect, done)


def _stdout(stdout: Any, done: Done) -> Iterator[str]:
    text = done.stdout.strip()
    if stdout == "empty" and text:
        yield f"standard output is not empty: {text}"
    elif isinstance(stdout, str) and text and _json(text) is None:  # described in prose
        yield f"standard output is not exactly one JSON value: {text}"
    elif isinstance(stdout, dict):
        keys = {*stdout.get("keys", []), *stdout.get("spec_keys", [])}
        document = _json(text)
        if not isinstance(document, dict) or not keys <= document.keys():
            yield f"not one JSON object with {sorted(keys)}: {text}"
        for key in stdout.keys() - {"keys", "spec_keys", "one_json_object", "note"}:
            yield f"the runner does not know stdout.{key}"


def _error(error: dict[str, Any], expect: dict[str, Any], done: Done) -> Iterator[str]:
    document = _json(done.stdout)
    if not isinstance(document, dict) or not {"cniVersion", "code", "msg"} <= document.keys():
        yield f"no error object on standard output: {done.stdout.strip()!r}"
        return
    wanted = error.get("spec_code")
    if wanted is not None and not _code_fits(wanted, document["code"]):
        yield f"code {document['code']}, not {error['spec_code']}: {document['msg']}"
    text = f"{document['msg']} {document.get('details', '')}"
    for name in _texts(expect.get("names"), error.get("names")):
        if name not in text:
            yield f"the error does not name {name}: {text}"
    for name in _texts(expect.get("details_name"), error.get("details_name")):
        if name not in document.get("details", ""):
            yield f"the details do not name {name}: {document.get('details')!r}"


def _texts(*values: Any) -> list[str]:
    """Each a list, one text, or None."""
    lists = [each if isinstance(each, list) else [each] for each in values if each is not None]
    return [str(text) for some in lists for text in some]


def _code_fits(wanted: Any, code: int) -> bool:
    if isinstance(wanted, list):
        return any(_code_fits(each, code) for each in wanted)
    if isinstance(wanted, str) and wanted.endswith("+"):
        return code >= int(wanted[:-1])
    return code == int(wanted)


def _result(wanted: Any, result: Any, previous: Any, results: dict[str, Any]) -> Iterator[str]:
    if isinstance(wanted, dict) and "equals" in wanted:
        name = wanted["equals"]
        other = previous if name == "prevResult" else results.get(name)
        if result != other:
            yield f"the result is not {name}: {json.dumps(result)}"
        return
    if result is None and wanted != "absent_or_empty":
        yield "no JSON on standard output"
        return
    yield from differences(wanted, result, "result")


def differences(wanted: Any, found: Any, where: str) -> Iterator[str]:
    """`wanted` is a subset of `found`; lists have the same length and order."""
    if isinstance(wanted, str) and wanted.startswith("${"):  # ${MAC}, ${ANY}
        if found is None:
            yield f"{where} is missing"
    elif wanted == "absent_or_empty":
        if found:
            yield f"{where} is {found!r}, expected nothing"
    elif isinstance(wanted, dict):
        if set(wanted) == {"length"}:
            if len(found or []) != wanted["length"]:
                yield f"{where} has {len(found or [])} entries, not {wanted['length']}: {found}"
        elif set(wanted) == {"contains"}:
            missing = [each for each in wanted["contains"] if each not in (found or [])]
            if missing:
                yield f"{where} lacks {missing}"
        elif not isinstance(found, dict):
            yield f"{where} is {found!r}, not an object"
        else:
            for key, value in wanted.items():
                yield from differences(value, found.get(key), f"{where}.{key}")
    elif isinstance(wanted, list) and not isinstance(found, list) and found is not None:
        if normal(found) not in map(normal, wanted):  # one of several
            yield f"{where} is {found!r}, not one of {wanted}"
    elif isinstance(wanted, list):
        if len(found or []) != len(wanted):
            yield f"{where} has {len(found or [])} entries, not {len(wanted)}: {found}"
        for i, (one, other) in enumerate(zip(wanted, found or [], strict=False)):
            yield from differences(one, other, f"{where}[{i}]")
    elif normal(wanted) != normal(found):
        yield f"{where} is {found!r}, not {wanted!r}"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
