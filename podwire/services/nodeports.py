"""Which of the node's addresses serve node ports: `--nodeport-addresses`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from podwire.errors import ConfigError, InvalidObject
from podwire.net import Address, Prefix, parse_prefix
from podwire.services.model import Family, NodeFacts, NodePortScope, ProxyConfig

_ALL: tuple[str, ...] = ("0.0.0.0/0", "::/0")
_LOCALHOST: tuple[str, ...] = ("127.0.0.0/8", "::1/128")


def nodeport_scopes(config: ProxyConfig, node: NodeFacts) -> Mapping[Family, NodePortScope]:
    """The scope of each family.

    A family without a CIDR in the list serves on all addresses, as does one with a zero CIDR
    (kube-proxy's rule); the keyword `primary` alone leaves a family without InternalIP unserved.
    Raises ConfigError for what is neither keyword nor CIDR.
    """
    prefixes = _prefixes(config.nodeport_addresses)
    loopback = config.localhost_nodeports or "localhost" in config.nodeport_addresses
    return {family: _scope(family, prefixes, config, node, loopback) for family in _FAMILIES}


_FAMILIES: tuple[Family, Family] = (4, 6)


def _prefixes(values: Sequence[str]) -> list[Prefix]:
    keywords = {"primary": (), "all": _ALL, "localhost": _LOCALHOST}
    out: list[Prefix] = []
    for value in values:
        for text in keywords.get(value, (value,)):
            try:
                out.append(parse_prefix(text))
            except InvalidObject as error:
                raise ConfigError(f"--nodeport-addresses: {error}") from None
    return out


def _scope(
    family: Family,
    prefixes: Sequence[Prefix],
    config: ProxyConfig,
    node: NodeFacts,
    loopback: bool,
) -> NodePortScope:
    bits = 32 if family == 4 else 128
    mine = [prefix for prefix in prefixes if prefix.bits == bits]
    if "primary" in config.nodeport_addresses:
        internal = node.internal_ip(family)
        if internal:
            mine.append(Prefix(internal, bits))
    elif not mine:
        return NodePortScope(None, loopback)
    if any(prefix.length == 0 for prefix in mine):
        return NodePortScope(None, loopback)
    return NodePortScope(tuple(sorted(set(mine))), loopback)


def selected_addresses(
    scope: NodePortScope, family: Family, addresses: Sequence[Address]
) -> list[Address]:
    """Those of a node's `addresses` that the option selects, loopback not yet taken out."""
    size = 4 if family == 4 else 16
    return [
        address
        for address in addresses
        if len(address) == size
        and (scope.prefixes is None or any(address in prefix for prefix in scope.prefixes))
    ]
