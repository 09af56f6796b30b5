"""CNI as the specification has it: commands, versions, error codes, and what a call must carry.

Source: https://github.com/containernetworking/cni/blob/main/SPEC.md (1.1.0), sections 2 and 5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from podwire.errors import PodwireError

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = VERSIONS[-1]

INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
DECODE_FAILURE = 6
INVALID_CONFIG = 7
INVALID_NETNS = 8
TRY_AGAIN = 11
NOT_AVAILABLE = 50
# 100 and above are the plugin's own.
KERNEL_REFUSED = 100
DIFFERS = 101  # CHECK: the live state is not what ADD left
ADDRESS_TAKEN = 102
NOT_EXPRESSIBLE = 104  # the result does not fit the requested version
INTERNAL = 110

_NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
}
_SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_VERSION = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}(-[0-9A-Za-z.-]+)?", re.ASCII)


class CniError(PodwireError):
    """An error as a runtime sees it: a code of the specification, a message, details."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def encode(self, version: str = NEWEST) -> bytes:
        """The error object that goes to standard output."""
        document: dict[str, object] = {
            "cniVersion": version,
            "code": self.code,
            "msg": self.message,
        }
        if self.details:
            document["details"] = self.details
        return msgspec.json.encode(document) + b"\n"


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of the plugin, its environment and configuration looked over.

    `config` is the network configuration as JSON objects; `plugin` the name the program was
    executed by. `netns_fd` is an open descriptor of the namespace, or None.
    """

    command: str
    plugin: str
    container: str
    netns: str
    ifname: str
    args: Mapping[str, str]
    network: str
    version: str
    config: Mapping[str, Any] = field(repr=False)
    netns_fd: int | None = None
    override: bool = False


def parse_call(
    plugin: str, environment: Mapping[str, str], stdin: bytes, netns_fd: int | None = None
) -> Call:
    """What the runtime asks for. Raises CniError 1, 4, 6 or 7."""
    command = environment.get("CNI_COMMAND", "")
    if command not in _NEEDED:
        if not command:
            raise CniError(INVALID_ENVIRONMENT, "required env variables [CNI_COMMAND] missing")
        raise CniError(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
    missing = [name for name in _NEEDED[command] if not environment.get(name)]
    if missing:
        names = ",".join(missing)
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{names}] missing")
    container, ifname = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    if "CNI_CONTAINERID" in _NEEDED[command]:
        _check_names(container, ifname)
    config = _decode(stdin)
    version = _version(config, command)
    return Call(
        command,
        plugin,
        container,
        environment.get("CNI_NETNS", ""),
        ifname,
        parse_args(environment.get("CNI_ARGS", "")),
        _network(config),
        version,
        config,
        netns_fd,
        environment.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "t", "true"),
    )


def _check_names(container: str, ifname: str) -> None:
    if not _NAME.fullmatch(container):
        raise CniError(INVALID_ENVIRONMENT, "invalid characters in containerID", container)
    problem = ""
    if len(ifname.encode()) > 15:
        problem = "interface name is too long: more than 15 characters"
    elif ifname in (".", ".."):
        problem = "interface name is . or .."
    elif re.search(r"[/:\s\0]", ifname):
        problem = "interface name contains / or : or whitespace characters"
    if problem:
        raise CniError(INVALID_ENVIRONMENT, problem, ifname)


def _decode(stdin: bytes) -> Mapping[str, Any]:
    try:
        config = msgspec.json.decode(stdin)
        if isinstance(config, dict) and "sysctl" in config:
            json.loads(stdin, object_pairs_hook=_no_sysctl_twice)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"error unmarshall network config: {error}"
        raise CniError(DECODE_FAILURE, message) from None
    if not isinstance(config, dict):
        message = "error unmarshall network config: not a JSON object"
        raise CniError(DECODE_FAILURE, message)
    return cast("dict[str, Any]", config)


def _no_sysctl_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys a decoder keeps one and says nothing: here that would be a guess."""
    names = [name for name, _ in pairs if name.startswith(("net.", "net/"))]
    if len(set(names)) < len(names):
        raise CniError(INVALID_CONFIG, "a sysctl is given twice", ", ".join(names))
    return dict(pairs)


def _network(config: Mapping[str, Any]) -> str:
    name = config.get("name")
    if name is None or name == "":
        raise CniError(INVALID_CONFIG, "missing network name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CniError(INVALID_CONFIG, "invalid characters found in network name", str(name))
    return name


def _version(config: Mapping[str, Any], command: str) -> str:
    """The version to answer in. An absent one counts as 0.1.0."""
    version = config.get("cniVersion") or "0.1.0"
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise CniError(DECODE_FAILURE, "cniVersion is no version", str(version))
    if version not in VERSIONS:
        details = f'config is "{version}", plugin supports {list(VERSIONS)}'
        raise CniError(INCOMPATIBLE_VERSION, "incompatible CNI versions", details)
    since = _SINCE.get(command, VERSIONS[0])
    if VERSIONS.index(version) < VERSIONS.index(since):
        message = f"config version does not allow {command}"
        details = f"{command} is there from {since} on, the configuration says {version}"
        raise CniError(INCOMPATIBLE_VERSION, message, details)
    return version


# Keys that runtimes pass and the plugin knows; others need IgnoreUnknown.
KNOWN_ARGS = {
    "IgnoreUnknown",
    "IP",
    "GATEWAY",
    "MAC",
    "K8S_POD_NAMESPACE",
    "K8S_POD_NAME",
    "K8S_POD_UID",
    "K8S_POD_INFRA_CONTAINER_ID",
}


def parse_args(text: str) -> Mapping[str, str]:
    """CNI_ARGS (``A=1;B=2``). Raises CniError 4 for a malformed pair or an unknown key."""
    if not text:
        return {}
    pairs: dict[str, str] = {}
    for pair in text.split(";"):
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise CniError(INVALID_ENVIRONMENT, f"ARGS: invalid pair {pair!r}")
        pairs[name] = value
    ignore = pairs.get("IgnoreUnknown", "").lower()
    if ignore not in ("", "0", "1", "f", "t", "false", "true"):
        raise CniError(INVALID_ENVIRONMENT, f"ARGS: IgnoreUnknown is no boolean: {ignore!r}")
    unknown = [f"{name}={value}" for name, value in pairs.items() if name not in KNOWN_ARGS]
    if unknown and ignore not in ("1", "t", "true"):
        raise CniError(INVALID_ENVIRONMENT, f"ARGS: unknown args {unknown}")
    return pairs


def answer_version(stdin: bytes) -> str:
    """The version for an error answer: the configuration's where it can be told."""
    try:
        version = _decode(stdin).get("cniVersion") or "0.1.0"
    except CniError:
        return NEWEST
    return version if version in VERSIONS else NEWEST
