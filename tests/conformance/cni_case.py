"""A CNI case: its file, its placeholders, and the reference's configuration in our form."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from podwire.cni.protocol import NEWEST

# Which of podwire's names does the work of a reference plugin; others are the plugin itself.
_NAMES = {
    "bridge": "podwire",
    "host-local": "podwire-ipam",
    "static": "podwire-ipam",
    "ptp": "podwire-ptp",
    "loopback": "podwire-loopback",
    "portmap": "podwire-portmap",
    "bandwidth": "podwire-bandwidth",
    "tuning": "podwire-tuning",
    "firewall": "podwire-firewall",
}
_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Case:
    """One file. `document` is as it was read."""

    id: str
    document: dict[str, Any]

    @property
    def plugin(self) -> str:
        return self.document.get("plugin", "")

    @property
    def version(self) -> str:
        return str(self.document.get("cni_version", "1.0.0"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.document.get("steps", [])


def load(path: Path) -> Case:
    """Raises ValueError when the file is no case."""
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, dict) or not isinstance(document.get("steps"), list):
        raise ValueError("not a case: no steps")
    return Case(str(document.get("id", path.stem)), document)


def name_of(plugin: str) -> str:
    """The program that stands for a plugin of the reference."""
    return _NAMES.get(plugin, "podwire")


def fill(value: Any, values: dict[str, str]) -> Any:
    """Placeholders replaced, in keys too; unknown ones stay."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {fill(key, values): fill(each, values) for key, each in value.items()}
    if isinstance(value, list):
        return [fill(each, values) for each in value]
    return value


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`; None removes a key."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def project_ipam(reference: dict[str, Any]) -> dict[str, Any]:
    """The reference's ipam object for the project's own address source."""
    ipam = {key: value for key, value in reference.items() if key not in ("type", "dataDir")}
    if "type" not in reference:
        return ipam
    # Of a plugin that is nowhere, its type is the point.
    ours = _NAMES.get(reference["type"]) == "podwire-ipam"
    return {"type": "podwire-ipam" if ours else reference["type"], **ipam}


def configuration(case: Case, step: dict[str, Any]) -> dict[str, Any]:
    """What goes to standard input of a call, placeholders still in it."""
    if "config_replace" in step:
        config = copy.deepcopy(step["config_replace"])
        reference = step.get("reference_ipam")
    else:
        config = merged(case.document.get("config", {}), step.get("config", {}))
        reference = step.get("reference_ipam", case.document.get("reference_ipam"))
    if reference is not None:
        config["ipam"] = project_ipam(reference)
    return config


def placeholders(case: Case) -> dict[str, str]:
    return {"CNI_VERSION": case.version, "NEWEST": NEWEST, "MISSING_PATH": "/run/netns/pwt-missing"}
