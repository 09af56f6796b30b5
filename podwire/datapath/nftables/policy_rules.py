"""The rules of table `podwire-policy`: constant, whatever the policies are.

In forward, input and bridged traffic, at priority -1: after destination NAT, before source NAT.
Replies and related ICMP errors pass by connection tracking, neighbour discovery always. What is
left is the first packet of a connection: if its source is a pod of this node with an egress rule
set, chain `egress4` judges it, if its destination is one with an ingress rule set, `ingress4`. What
the node itself sends (hook output) is not judged: a pod's own node always reaches it.

A judging chain finds two numbers by address, the pod's rule set and the peer's identity; map
`cases` has a third for the two of them, and by this (case, protocol, port) is looked up, most exact
map first:

    exact       one port            ranges      some ports
    protocols   any port            any         any protocol: the end of every case

first with the peer's own identity, then, if the peer is no host of the cluster, with that of the
address block around it, and last with identity 0, the rule set's default, which always decides. The
maps' data is a code, and `verdicts` says what the code means and counts it. Most identities fare
alike in a rule set, so there are far fewer cases than pairs.

Pods are told apart by source address, so that a bridge needs no other rules than a routed pod. That
is the same as by link as long as no link can send with another's address: the spoof guards see to
it (`spoof`, `spoof_routed`). The bridge table here is their counterpart for delivery: see
`BRIDGE_SCRIPT`.

The keys of address blocks begin with a field that is always 0: nftables keeps ranges of several
fields one by one, but sews those of one field together, so that none could change alone.
"""

from __future__ import annotations

from podwire.datapath.policy import AUDITED_PREFIX, DENIED_PREFIX, LOG_GROUP, SNAPLEN
from podwire.kernel.nftables import BRIDGE, INET, Set, expressions, goto, jump

TABLE = "podwire-policy"
_LIMIT = "limit rate 100/second burst 200 packets"

EXACT, RANGES = Set(INET, TABLE, "exact"), Set(INET, TABLE, "ranges")
PROTOCOLS, ANY = Set(INET, TABLE, "protocols"), Set(INET, TABLE, "any")
CASES = Set(INET, TABLE, "cases")
VERDICTS, LINKS = Set(INET, TABLE, "verdicts"), Set(INET, TABLE, "links")
EGRESS = {4: Set(INET, TABLE, "egress4"), 16: Set(INET, TABLE, "egress6")}
INGRESS = {4: Set(INET, TABLE, "ingress4"), 16: Set(INET, TABLE, "ingress6")}
PEERS = {4: Set(INET, TABLE, "peers4"), 16: Set(INET, TABLE, "peers6")}
BLOCKS = {4: Set(INET, TABLE, "blocks4"), 16: Set(INET, TABLE, "blocks6")}
INET_SETS = (
    VERDICTS, LINKS, CASES, EXACT, RANGES, PROTOCOLS, ANY,
    *EGRESS.values(), *INGRESS.values(), *PEERS.values(), *BLOCKS.values(),
)  # fmt: skip

PORTS, CLOSED_PORTS = Set(BRIDGE, TABLE, "ports"), Set(BRIDGE, TABLE, "closed-ports")
MEMBERS = {4: Set(BRIDGE, TABLE, "members4"), 16: Set(BRIDGE, TABLE, "members6")}
BRIDGE_SETS = (PORTS, CLOSED_PORTS, *MEMBERS.values())

# 130-132, 143: multicast listeners; 133-137: neighbour discovery. nft has no name for all of them.
_ALWAYS = "icmpv6 type { 130, 131, 132, 133, 134, 135, 136, 137, 143 }"

STRUCTURE = f"""
table inet {TABLE} {{
  map egress4 {{ type ipv4_addr : mark; }}
  map egress6 {{ type ipv6_addr : mark; }}
  map ingress4 {{ type ipv4_addr : mark; }}
  map ingress6 {{ type ipv6_addr : mark; }}
  map peers4 {{ type ipv4_addr : mark; }}
  map peers6 {{ type ipv6_addr : mark; }}
  map blocks4 {{ type mark . ipv4_addr : mark; flags interval; }}
  map blocks6 {{ type mark . ipv6_addr : mark; flags interval; }}
  map cases {{ type mark . mark : mark; }}
  map exact {{ type mark . inet_proto . inet_service : mark; }}
  map ranges {{ type mark . inet_proto . inet_service : mark; flags interval; }}
  map protocols {{ type mark . inet_proto : mark; }}
  map any {{ type mark : mark; }}
  map verdicts {{ type mark : verdict; counter; }}
  set links {{ type ifname; }}
  chain denied {{ }}
  chain audited {{ }}
  chain egress4 {{ }}
  chain egress6 {{ }}
  chain ingress4 {{ }}
  chain ingress6 {{ }}
  chain egress4-default {{ }}
  chain egress6-default {{ }}
  chain ingress4-default {{ }}
  chain ingress6-default {{ }}
  chain from-pod {{ }}
  chain to-pod {{ }}
  chain forward {{ type filter hook forward priority -1; policy accept; }}
  chain input {{ type filter hook input priority -1; policy accept; }}
}}
"""

# A link-local source names no pod, and pods have no use for one but neighbour discovery.
BASE = f"""
flush chain inet {TABLE} denied
flush chain inet {TABLE} audited
flush chain inet {TABLE} forward
flush chain inet {TABLE} input
table inet {TABLE} {{
  chain denied {{
    {_LIMIT} log prefix "{DENIED_PREFIX}" group {LOG_GROUP} snaplen {SNAPLEN}
    drop
  }}
  chain audited {{
    {_LIMIT} log prefix "{AUDITED_PREFIX}" group {LOG_GROUP} snaplen {SNAPLEN}
  }}
  chain forward {{
    ct state established,related accept
    {_ALWAYS} accept
    jump from-pod
    jump to-pod
  }}
  chain input {{
    iifname lo accept
    ct state established,related accept
    {_ALWAYS} accept
    iifname @links ip6 saddr fe80::/10 drop
    jump from-pod
  }}
}}
"""

# A pod's port takes what is addressed to the pod. Otherwise a pod could send to one address what
# its egress policy allows to another, with the help of a second pod that listens to the frames of
# its port; and multicast, which is addressed to nobody's rule set, would reach isolated pods.
BRIDGE_SCRIPT = f"""
table bridge {TABLE} {{
  set ports {{ type ifname; }}
  set closed-ports {{ type ifname; }}
  set members4 {{ type ifname . ipv4_addr; }}
  set members6 {{ type ifname . ipv6_addr; }}
  chain forward {{ type filter hook forward priority -1; policy accept; }}
}}
flush chain bridge {TABLE} forward
table bridge {TABLE} {{
  chain forward {{
    oifname != @ports accept
    ether type arp accept
    oifname . ip daddr @members4 accept
    oifname . ip6 daddr @members6 accept
    {_ALWAYS} accept
    oifname != @closed-ports ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 accept
    drop
  }}
}}
"""


def judging_chains() -> dict[str, list[list[bytes]]]:
    """The chains that nft's grammar cannot say."""
    chains: dict[str, list[list[bytes]]] = {"from-pod": [], "to-pod": []}
    for bits, digit in ((32, "4"), (128, "6")):
        source, destination = expressions.source_address, expressions.destination_address
        for direction, own, other in (
            ("egress", source, destination),
            ("ingress", destination, source),
        ):
            name = f"{direction}{digit}"
            entry = "from-pod" if direction == "egress" else "to-pod"
            subject = own(bits, _ADDRESS) + expressions.lookup(name, _ADDRESS, _FOUND_RULES)
            chains[entry].append(
                [
                    expressions.only_family(bits),
                    subject,
                    expressions.through_mark((_FOUND_RULES, _RULES), spare=_SPARE),
                    expressions.verdict(jump(name)),
                ]
            )
            judged: list[list[bytes]] = []
            peer = other(bits, _ADDRESS)
            block = expressions.constant(bytes(4), _ADDRESS - 1)
            for identities in (
                expressions.lookup(f"peers{digit}", _ADDRESS, _FOUND_IDENTITY),
                block + expressions.lookup(f"blocks{digit}", _ADDRESS - 1, _FOUND_IDENTITY),
            ):
                head = expressions.only_family(bits) + subject + peer + identities
                both = ((_FOUND_RULES, _RULES), (_FOUND_IDENTITY, _IDENTITY))
                head += expressions.through_mark(*both, spare=_SPARE)
                case = head + _FIND_CASE
                judged += [[case, *steps] for steps in _LOOKUPS]
                judged.append([head, expressions.verdict(goto(f"{name}-default"))])
            judged.append([expressions.verdict(goto(f"{name}-default"))])
            chains[name] = judged
            head = expressions.only_family(bits) + subject
            head += expressions.through_mark((_FOUND_RULES, _RULES), spare=_SPARE)
            head += expressions.constant(bytes(4), _IDENTITY) + _FIND_CASE
            chains[f"{name}-default"] = [[head, *steps] for steps in _LOOKUPS]
    return chains


# Registers: the keys (rule set, identity) and (case, protocol, port) must be in a row.
_RULES, _IDENTITY, _CASE, _PROTOCOL, _PORT, _CODE = 0, 1, 2, 3, 4, 5
_FOUND, _FOUND_RULES, _FOUND_IDENTITY, _SPARE, _ADDRESS = 6, 7, 8, 9, 11

_FIND_CASE = expressions.lookup("cases", _RULES, _FOUND) + expressions.through_mark(
    (_FOUND, _CASE), spare=_SPARE
)


def _decide(name: str) -> bytes:
    return (
        expressions.lookup(name, _CASE, _FOUND)
        + expressions.through_mark((_FOUND, _CODE), spare=_SPARE)
        + expressions.lookup("verdicts", _CODE)
    )


_WITH_PROTOCOL = expressions.transport_protocol(_PROTOCOL)
_WITH_PORT = _WITH_PROTOCOL + expressions.destination_port(_PORT)
_LOOKUPS = (
    [_WITH_PORT, _decide("exact")],
    [_WITH_PORT, _decide("ranges")],
    [_WITH_PROTOCOL, _decide("protocols")],
    [_decide("any")],
)
