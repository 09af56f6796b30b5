"""Field errors in the API server's form, and its rules for names, labels, ports, addresses.

Every rule returns the sentences that the API server would use; none means the value is good.
Source: k8s.io/apimachinery/pkg/util/validation (1.36: strict addresses and CIDRs).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, NamedTuple

import msgspec

from podwire.kube.objects import Json
from podwire.lab import tree


class FieldError(NamedTuple):
    """``spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive``."""

    field: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def invalid(field: str, value: Any, why: str) -> FieldError:
    return FieldError(field, "FieldValueInvalid", f"Invalid value: {_shown(value)}: {why}")


def required(field: str, why: str = "") -> FieldError:
    return FieldError(field, "FieldValueRequired", f"Required value: {why}".rstrip(": "))


def forbidden(field: str, why: str) -> FieldError:
    return FieldError(field, "FieldValueForbidden", f"Forbidden: {why}")


def duplicate(field: str, value: Any) -> FieldError:
    return FieldError(field, "FieldValueDuplicate", f"Duplicate value: {_shown(value)}")


def unsupported(field: str, value: Any, supported: list[str]) -> FieldError:
    listed = ", ".join(f'"{one}"' for one in sorted(supported))
    message = f"Unsupported value: {_shown(value)}: supported values: {listed}"
    return FieldError(field, "FieldValueNotSupported", message)


# --- names and labels ----------------------------------------------------------------------------

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")


def dns_label(text: str) -> list[str]:
    out = [] if len(text) <= 63 else ["must be no more than 63 characters"]
    if not _DNS_LABEL.fullmatch(text):
        out.append(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or "
            "'-', and must start and end with an alphanumeric character (e.g. 'my-name',  or "
            "'123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
        )
    return out


def dns_1035_label(text: str) -> list[str]:
    out = [] if len(text) <= 63 else ["must be no more than 63 characters"]
    if not _DNS_1035.fullmatch(text):
        out.append(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start "
            "with an alphabetic character, and end with an alphanumeric character (e.g. "
            "'my-name',  or 'abc-123', regex used for validation is "
            "'[a-z]([-a-z0-9]*[a-z0-9])?')"
        )
    return out


def subdomain(text: str) -> list[str]:
    out = [] if len(text) <= 253 else ["must be no more than 253 characters"]
    if not _SUBDOMAIN.fullmatch(text):
        out.append(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, "
            "'-' or '.', and must start and end with an alphanumeric character (e.g. "
            "'example.com', regex used for validation is "
            r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
        )
    return out


def qualified_name(text: str) -> list[str]:
    prefix, slash, name = text.rpartition("/")
    out: list[str] = []
    if slash:
        out = [f"prefix part {problem}" for problem in subdomain(prefix)]
    if not name or len(name) > 63 or not _QUALIFIED.fullmatch(name):
        out.append(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start "
            "and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or "
            "'123-abc', regex used for validation is "
            "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
        )
    return out


def _label_value(text: str) -> list[str]:
    out = [] if len(text) <= 63 else ["must be no more than 63 characters"]
    if not _LABEL_VALUE.fullmatch(text):
        out.append(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', "
            "'_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  "
            "or 'my_value',  or '12345', regex used for validation is "
            "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
        )
    return out


def labels(path: str, found: Json | None) -> list[FieldError]:
    out: list[FieldError] = []
    for key, value in (found or {}).items():
        out += [invalid(path, key, problem) for problem in qualified_name(key)]
        out += [invalid(path, value, problem) for problem in _label_value(str(value))]
    return out


def label_selector(path: str, selector: Json | None) -> list[FieldError]:
    if not selector:
        return []
    out = labels(f"{path}.matchLabels", selector.get("matchLabels"))
    for i, term in enumerate(tree.mappings(selector, "matchExpressions")):
        at = f"{path}.matchExpressions[{i}]"
        operator, values = term.get("operator"), tree.texts(term, "values")
        if operator in ("In", "NotIn"):
            if not values:
                why = "must be specified when `operator` is 'In' or 'NotIn'"
                out.append(required(f"{at}.values", why))
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
                out.append(forbidden(f"{at}.values", why))
        else:
            out.append(invalid(f"{at}.operator", operator, "not a valid selector operator"))
        key = term.get("key", "")
        out += [invalid(f"{at}.key", key, problem) for problem in qualified_name(key)]
        for j, value in enumerate(values):
            where = f"{at}.values[{j}]"
            out += [invalid(where, value, problem) for problem in _label_value(str(value))]
    return out


# --- ports ---------------------------------------------------------------------------------------

_PORT_NAME = re.compile(r"[-a-z0-9]+")


def port_number(number: int) -> list[str]:
    return [] if 1 <= number <= 65535 else ["must be between 1 and 65535, inclusive"]


def port_name(text: str) -> list[str]:
    out: list[str] = []
    if len(text) > 15:
        out.append("must be no more than 15 characters")
    if not _PORT_NAME.fullmatch(text):
        out.append("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    if not re.search("[a-z]", text):
        out.append("must contain at least one letter (a-z)")
    if "--" in text:
        out.append("must not contain consecutive hyphens")
    if text.startswith("-") or text.endswith("-"):
        out.append("must not begin or end with a hyphen")
    return out


def port(value: Any) -> list[str]:
    """A port number or a port name."""
    if isinstance(value, int) and not isinstance(value, bool):
        return port_number(value)
    return port_name(str(value))


# --- addresses -----------------------------------------------------------------------------------

_BAD_IP = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
_BAD_CIDR = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"


def _without_zeros(text: str) -> str:
    """IPv4 text with leading zeros read as decimal, as objects stored long ago may have it."""
    if ":" in text:
        return text
    return ".".join(part.lstrip("0") or part[:1] for part in text.split("."))


def address(text: Any, *, strict: bool = True) -> list[str]:
    """`strict` is what new values are held to; stored ones may be sloppier."""
    try:
        found = ipaddress.ip_address(_without_zeros(str(text)))
    except ValueError:
        return [_BAD_IP]
    if not strict:
        return []
    out: list[str] = []
    if "%" in str(text):
        return [_BAD_IP]
    if ":" not in text and _without_zeros(text) != text:
        out.append("must not have leading 0s")
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        out.append("must not be an IPv4-mapped IPv6 address")
    return out


def cidr(text: Any, *, strict: bool = True) -> list[str]:
    ip, slash, length = str(text).partition("/")
    if not slash or not (length.isascii() and length.isdigit()) or "%" in ip:
        return [_BAD_CIDR]
    try:
        interface = ipaddress.ip_interface(f"{_without_zeros(ip)}/{int(length)}")
    except ValueError:
        return [_BAD_CIDR]
    if not strict:
        return []
    out: list[str] = []
    if isinstance(interface, ipaddress.IPv6Interface) and interface.ip.ipv4_mapped:
        out.append("must not have an IPv4-mapped IPv6 address")
    if ":" not in ip and _without_zeros(ip) != ip:
        out.append("must not have leading 0s in IP")
    if str(int(length)) != length:
        out.append("must not have leading 0s in prefix length")
    if interface.ip != interface.network.network_address:
        out.append("must not have bits set beyond the prefix length")
    return out


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Of text that `cidr` accepts at least when it is not strict."""
    ip, _, length = text.partition("/")
    return ipaddress.ip_network(f"{_without_zeros(ip)}/{int(length)}", strict=False)


def is_ipv6(text: str) -> bool:
    return ":" in text
