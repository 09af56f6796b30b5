"""The rules of table `podwire-services`, in nft's own words. One table per family.

They are the same for ten Services and for 30,000: Services, endpoints and node addresses are
elements. Chains come only for another number of backends and another affinity timeout (`Rule`).

The way of a first packet:

    ranges      who may use a load balancer address (before DNAT)
    services    frontend → class; the class says how to treat the client, and how many backends
    dispatch    masquerade or not, policy Local or not; then to the chain for that many backends
    lb-N        frontend and a random slot below N → backend
    check       what was not translated: no endpoints, undefined port, unallocated address
    postrouting masquerade

The class is held in `meta priority`, a field of the packet that nothing reads this early: routing
and policies look at `meta mark`, which stays untouched. It is cleared before the packet leaves.
Node ports have the same chains again, keyed by protocol and port alone, since the address is any of
the node's. Policy Local has a second list for its short cuts (pods and the node use all endpoints).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from podwire.net import Prefix
from podwire.services import Family, ProxyConfig

TABLE = "podwire-services"
SPACES = ("", "nodeport-")
LISTS = ("", "shortcut-")
MASQUERADE_MARK = 0x4000

# The class: how to treat the client in the top byte, the number of backends below; or, with
# `AFFINITY`, the timeout in seconds.
CLUSTER_IP, EXTERNAL, EXTERNAL_LOCAL = 1 << 24, 2 << 24, 3 << 24
AFFINITY = 1 << 23
_CLASS = AFFINITY * 2 - 1

# An affinity id: the list of backends in the upper bits, the backend's number in it in the lower.
ID_BITS = 17
ID_MASK = (1 << ID_BITS) - 1
LIST_MASK = 0xFFFFFFFF ^ ID_MASK
_AFFINITY_CLIENTS = 1 << 20

_READY_MADE = range(1, 17)
"""Numbers of backends whose chains are there from the start: no Service waits for `nft` then."""


class Rule(NamedTuple):
    """A chain that exists only when needed.

    `lb` picks one of `number` backends; `new` does so for a client whose affinity begins;
    `affinity` remembers for `number` seconds.
    """

    space: str
    list: str
    kind: Literal["lb", "new", "affinity"]
    number: int

    @property
    def chain(self) -> str:
        return f"{self.space}{self.list}{self.kind}-{self.number}"


def ready_made() -> list[Rule]:
    return [Rule(space, lst, "lb", n) for space in SPACES for lst in LISTS for n in _READY_MADE]


def parse_chain(name: str) -> Rule | None:
    """The rule whose chain has this name, if it is one."""
    space = "nodeport-" if name.startswith("nodeport-") else ""
    rest = name[len(space) :]
    lst = "shortcut-" if rest.startswith("shortcut-") else ""
    kind, _, number = rest[len(lst) :].rpartition("-")
    if kind in ("lb", "new", "affinity") and number.isdigit():
        return Rule(space, lst, kind, int(number))  # type: ignore[arg-type]
    return None


class Words:
    """How one family spells the fields."""

    def __init__(self, family: Family) -> None:
        self.ip = "ip" if family == 4 else "ip6"
        self.address = f"ipv{family}_addr"
        self.table = f"{self.ip} {TABLE}"
        # nft 1.0.6 aborts on a map statement whose key is longer than 16 bytes. Clients whose
        # hashes agree share a backend, nothing worse.
        self.client = (
            "ip saddr" if family == 4 else "jhash ip6 saddr mod 0xffffffff seed 0x706f6477"
        )
        self.client_type = "ip saddr" if family == 4 else "numgen random mod 65535"

    def key(self, space: str) -> str:
        return "meta l4proto . th dport" if space else f"{self.ip} daddr . meta l4proto . th dport"

    def key_type(self, space: str) -> str:
        return (
            "inet_proto . inet_service" if space else f"{self.address} . inet_proto . inet_service"
        )


def structure(family: Family, config: ProxyConfig) -> str:
    """The script that makes the table, or makes its rules anew and leaves the elements alone."""
    words = Words(family)
    chains = _chains(words, config)
    pods = ", ".join(map(str, _of_family(words, config.detect_local.prefixes)))
    out = [f"table {words.table} {{", *_sets(words)]
    out += [f"  chain {name} {{ {hook} }}" for name, (hook, _) in chains.items()]
    out.append("}")
    out += [f"flush chain {words.table} {name}" for name in chains]
    out.append(f"flush set {words.table} pods")
    if pods:
        out.append(f"add element {words.table} pods {{ {pods} }}")
    out.append(f"table {words.table} {{")
    for name, (_, rules) in chains.items():
        out += [f"  chain {name} {{", *(f"    {rule}" for rule in rules), "  }"]
    out.append("}")
    return "\n".join(out) + "\n"


def rules_script(family: Family, rules: list[Rule]) -> str:
    """The script that adds the chains of `rules` and makes them reachable."""
    words = Words(family)
    return "".join(line + "\n" for rule in rules for line in _rule(words, rule))


def removal_script(family: Family, rules: list[Rule]) -> str:
    """The script that takes the chains of `rules` away again; nothing may lead to them."""
    words = Words(family)
    out: list[str] = []
    for rule in rules:
        out.append(f"delete element {words.table} {_balance(rule)} {{ {_class(rule):#x} }}")
        out.append(f"flush chain {words.table} {rule.chain}")
        out.append(f"delete chain {words.table} {rule.chain}")
    return "".join(line + "\n" for line in out)


def _sets(words: Words) -> list[str]:
    address = words.address
    out = [
        "  counter rejected { }",
        "  counter dropped { }",
        f"  set pods {{ type {address}; flags interval; }}",
        f"  set cluster-ips {{ type {address}; }}",
        f"  set service-cidrs {{ type {address}; flags interval; }}",
        f"  set nodeport-addresses {{ type {address}; flags interval; }}",
        f"  set hairpin {{ type {address} . {address}; }}",
        f"  set ranged {{ type {words.key_type('')}; }}",
        f"  set ranges {{ type {words.key_type('')} . {address}; flags interval; }}",
        f"  map affinity-backends {{ type classid : {address} . inet_service; }}",
        f"  map affinity {{ typeof {words.client_type} . meta priority : meta priority; "
        f"flags dynamic,timeout; size {_AFFINITY_CLIENTS}; }}",
    ]
    for space in SPACES:
        key_type = words.key_type(space)
        slot = f"{key_type} . classid"
        out += [
            f"  set {space}rejected {{ type {key_type}; counter; }}",
            f"  set {space}dropped {{ type {key_type}; counter; }}",
            f"  map {space}frontends {{ type {key_type} : classid; counter; }}",
            f"  map {space}shortcuts {{ type {key_type} : classid; }}",
        ]
        for lst in LISTS:
            name = space + lst
            out += [
                f"  map {name}balance {{ type classid : verdict; }}",
                f"  map {name}backends {{ type {slot} : {address} . inet_service; }}",
                f"  map {name}affinity-new {{ type classid : verdict; }}",
                f"  map {name}affinity-lists {{ type {key_type} : classid; }}",
                f"  map {name}affinity-counts {{ type {key_type} : classid; }}",
                f"  map {name}affinity-slots {{ type {slot} : classid; }}",
            ]
    return out


def _chains(words: Words, config: ProxyConfig) -> dict[str, tuple[str, list[str]]]:
    """Every fixed chain with its hook and rules; callees first."""
    ip, key, nodeport = words.ip, words.key(""), words.key("nodeport-")
    to_node = f"{ip} daddr @nodeport-addresses fib daddr type local"
    not_ours = "ct state new ct status and dnat == 0"
    mark = f"ct mark set ct mark or {MASQUERADE_MARK:#x}"
    chains: dict[str, tuple[str, list[str]]] = {
        "refuse": ("", ["counter name rejected reject"]),
        "discard": ("", ["counter name dropped drop"]),
        "masquerade-later": ("", [mark]),
        "cluster-ip": ("", _cluster_ip_rules(words, config)),
    }
    for space in SPACES:
        chains |= _dispatch(words, config, space)
    chains["services"] = (
        "",
        [
            f"meta priority set {key} map @frontends goto dispatch",
            f"{to_node} meta priority set {nodeport} map @nodeport-frontends "
            "goto nodeport-dispatch",
        ],
    )
    ranges = [
        f"ct state new {key} @ranged {key} . {ip} saddr != @ranges goto discard",
    ]
    checks = [f"{key} @rejected goto refuse", f"{key} @dropped goto discard"]
    addresses = [f"{ip} daddr @cluster-ips goto refuse", f"{ip} daddr @service-cidrs goto discard"]
    chains |= {
        "check": ("", checks),
        "check-addresses": ("", addresses),
        "check-nodeports": (
            "",
            [
                f"{nodeport} @nodeport-rejected goto refuse",
                f"{nodeport} @nodeport-dropped goto discard",
            ],
        ),
        "ranges-prerouting": (
            _hook("filter", "prerouting", -110),
            [*_loopback_guard(words, config), *ranges],
        ),
        "ranges-output": (_hook("filter", "output", -110), ranges),
        "prerouting": (_hook("nat", "prerouting", -100), ["jump services"]),
        "output": (_hook("nat", "output", -100), ["jump services"]),
        "check-input": (
            _hook("filter", "input", 0),
            [f"{not_ours} jump check", f"{not_ours} {to_node} jump check-nodeports"],
        ),
        "check-forward": (
            _hook("filter", "forward", 0),
            [f"{not_ours} jump check", f"{not_ours} jump check-addresses"],
        ),
        "check-output": (
            _hook("filter", "output", 0),
            [f"{not_ours} jump check", f"{not_ours} jump check-addresses"],
        ),
        "postrouting": (
            _hook("nat", "postrouting", 100),
            [
                f"ct status dnat meta priority >= {CLUSTER_IP:#x} meta priority set 0",
                f"ct mark and {MASQUERADE_MARK:#x} != 0 masquerade fully-random",
                f"ct status dnat {ip} saddr . {ip} daddr @hairpin masquerade fully-random",
            ],
        ),
    }
    return chains


def _hook(kind: str, hook: str, priority: int) -> str:
    return f"type {kind} hook {hook} priority {priority}; policy accept;"


def _dispatch(words: Words, config: ProxyConfig, space: str) -> dict[str, tuple[str, list[str]]]:
    """By class to the chain that balances."""
    shortcut = f"meta priority set {words.key(space)} map @{space}shortcuts goto {space}shortcut"
    balance = f"meta priority and {_CLASS:#x} vmap @{space}balance"
    pod = _pod(words, config, "")
    return {
        f"{space}shortcut": ("", [f"meta priority vmap @{space}shortcut-balance"]),
        f"{space}external-local": (
            "",
            [
                *([f"{pod} {shortcut}"] if pod else []),
                "fib saddr type local jump masquerade-later",
                f"fib saddr type local {shortcut}",
                balance,
            ],
        ),
        f"{space}dispatch": (
            "",
            [
                f"meta priority and {0xFFFFFFFF ^ _CLASS:#x} vmap {{ "
                f"{CLUSTER_IP:#x} : jump cluster-ip, "
                f"{EXTERNAL:#x} : jump masquerade-later, "
                f"{EXTERNAL_LOCAL:#x} : goto {space}external-local }}",
                balance,
            ],
        ),
    }


def _cluster_ip_rules(words: Words, config: ProxyConfig) -> list[str]:
    if config.masquerade_all:
        return ["jump masquerade-later"]
    stranger = _pod(words, config, "!= ")
    return [f"{stranger} jump masquerade-later"] if stranger else []


def _pod(words: Words, config: ProxyConfig, negation: str) -> str:
    """Matches what comes from a pod, or (with ``!= ``) what does not; empty without a detector."""
    if config.detect_local.interface:
        return f'iifname {negation}"{config.detect_local.interface}"'
    return f"{words.ip} saddr {negation}@pods" if config.detect_local.prefixes else ""


def _loopback_guard(words: Words, config: ProxyConfig) -> list[str]:
    """With route_localnet on, nobody but the node may speak to 127.0.0.0/8 (CVE-2020-8558)."""
    if words.ip != "ip" or not config.serves_loopback:
        return []
    return [
        'iifname != "lo" ip daddr 127.0.0.0/8 goto discard',
        'iifname != "lo" ip saddr 127.0.0.0/8 goto discard',
    ]


def _of_family(words: Words, prefixes: tuple[Prefix, ...]) -> list[Prefix]:
    bits = 32 if words.ip == "ip" else 128
    return [prefix for prefix in prefixes if prefix.bits == bits]


def _balance(rule: Rule) -> str:
    return f"{rule.space}{rule.list}{'affinity-new' if rule.kind == 'new' else 'balance'}"


def _class(rule: Rule) -> int:
    return AFFINITY | rule.number if rule.kind == "affinity" else rule.number


def _rule(words: Words, rule: Rule) -> list[str]:
    verb = "jump" if rule.kind == "new" else "goto"
    table, chain = words.table, rule.chain
    rules = {"lb": _lb, "new": _new, "affinity": _affinity}[rule.kind](words, rule)
    return [
        f"add chain {table} {chain}",
        f"flush chain {table} {chain}",
        *(f"add rule {table} {chain} {text}" for text in rules),
        f"add element {table} {_balance(rule)} {{ {_class(rule):#x} : {verb} {chain} }}",
    ]


_L4 = "meta l4proto { tcp, udp, sctp }"  # nft wants to be told that there are ports


def _lb(words: Words, rule: Rule) -> list[str]:
    backend = f"{words.key(rule.space)} . meta priority map @{rule.space}{rule.list}backends"
    return [
        f"meta priority set numgen random mod {rule.number}",
        f"{_L4} dnat {words.ip} to {backend}",
    ]


def _new(words: Words, rule: Rule) -> list[str]:
    slots = f"{rule.space}{rule.list}affinity-slots"
    return [
        f"meta priority set numgen random mod {rule.number}",
        f"meta priority set {words.key(rule.space)} . meta priority map @{slots}",
    ]


def _affinity(words: Words, rule: Rule) -> list[str]:
    """Look up, refresh and use the client's backend; without one that lives, choose and learn."""
    key, name = words.key(rule.space), rule.space + rule.list
    entry = f"{words.client} . (meta priority and {LIST_MASK:#x})"
    known = f"meta priority and {ID_MASK:#x} != 0"
    use = (
        f"meta l4proto {{ tcp, udp, sctp }} dnat {words.ip} to meta priority map @affinity-backends"
    )
    return [
        f"meta priority set {key} map @{name}affinity-lists",
        # A miss leaves the list's id, whose lower bits are 0.
        f"meta priority set {words.client} . meta priority map @affinity",
        # update prolongs an element but keeps its data; so a dead backend is deleted first.
        f"{known} update @affinity {{ {entry} timeout {rule.number}s : meta priority }}",
        use,
        f"{known} delete @affinity {{ {entry} : meta priority }}",
        f"meta priority set {key} map @{name}affinity-counts",
        f"meta priority vmap @{name}affinity-new",
        f"add @affinity {{ {entry} timeout {rule.number}s : meta priority }}",
        # Of two packets at once the first to learn decides for both.
        f"meta priority set {entry} map @affinity",
        use,
    ]
