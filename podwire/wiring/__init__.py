"""A pod's link: made, compared and removed. In: an attachment; out: kernel state.

A wiring (`bridge`, `ptp`, `routed`) implements `Wiring`; `meters`, `hostports` and `masquerade` are
what hangs on a link that is there already.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import msgspec

from podwire.net import Address, Prefix, network

# Who made a neighbour entry or route (rtm_protocol, NDA_PROTOCOL): ours are told from others by it.
KERNEL_PROTOCOL = 112


class Key(NamedTuple):
    """What names an attachment: CNI's network, container and interface, and the plugin's part.

    `plugin` is the name the plugin was executed by: in a chain several parts of podwire may work on
    one interface, and each has its own record.
    """

    network: str
    container: str
    ifname: str
    plugin: str = "podwire"


class Pod(NamedTuple):
    """Whose link it is; empty where the runtime did not say."""

    namespace: str = ""
    name: str = ""
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else ""


class PodAddress(NamedTuple):
    """An address of the pod; `length` is the prefix length, `gateway` b"" where there is none."""

    address: Address
    length: int
    gateway: Address = b""

    @property
    def network(self) -> Prefix:
        """What is on the link with the pod."""
        return network(self.address, self.length)


class PodRoute(NamedTuple):
    """A route inside the pod. 0 and b"" mean unset, `scope` -1 too."""

    prefix: Prefix
    gateway: Address = b""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int = 0
    scope: int = -1


class Trunk(NamedTuple):
    """VLANs `first` to `last`, tagged."""

    first: int
    last: int


class Bridge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the pod's link meets the bridge."""

    name: str
    gateway: bool = False
    """The bridge has the gateway addresses."""
    default_gateway: bool = False
    """The pod's default routes lead there."""
    force_address: bool = False
    """Another gateway address of the bridge is replaced, not respected."""
    hairpin: bool = False
    promiscuous: bool = False
    isolated: bool = False
    check_mac: bool = False
    """Frames with another source MAC are dropped also when no address is known to check."""
    vlan: int = 0
    trunk: tuple[Trunk, ...] = ()
    keep_default_vlan: bool = True
    leave_down: bool = False
    """The pod's end stays down."""


class HostPort(NamedTuple):
    """`host_ip` b"": any address of the pod addresses' families. `protocol` is IANA's number."""

    port: int
    container_port: int
    protocol: int
    host_ip: Address = b""


class HostPorts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ports of the node that lead to the pod.

    `masquerade`: "local" for what the pod could not answer otherwise (from the pod's own network
    and from 127.0.0.0/8), "all", or "none".
    """

    ports: tuple[HostPort, ...]
    targets: tuple[PodAddress, ...]
    masquerade: str = "local"


class Bandwidth(NamedTuple):
    """Rates in bit/s, bursts in bits; ingress is what the pod receives. 0: unlimited."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


class Meter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A limit on the link with that host end; `ifb` names the link that shapes egress, or is ""."""

    host_ifname: str
    limits: Bandwidth
    ifb: str = ""


class HostLink(NamedTuple):
    """A link on the host that the answer to ADD names."""

    name: str
    mac: bytes = b""
    mtu: int = 0


class Attachment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One interface of one pod: what CNI's ADD made and its DEL takes away. A value.

    `result` is the answer to ADD in the newest version's form, as JSON text.
    """

    key: Key
    netns: str = ""
    pod: Pod = Pod()
    pool: str = ""
    addresses: tuple[PodAddress, ...] = ()
    routes: tuple[PodRoute, ...] = ()
    mac: bytes = b""
    mtu: int = 0
    wiring: str = ""
    """Which wiring made the link; "" when this part of a chain made none."""
    host_ifname: str = ""
    host_ifindex: int = 0
    host_mac: bytes = b""
    host_links: tuple[HostLink, ...] = ()
    """What the answer lists before the pod's end: the bridge, the host end."""
    further_links: tuple[HostLink, ...] = ()
    """What it lists after it."""
    bridge: Bridge | None = None
    route_table: int = 0
    """Routed: the table for what the pod sends, that of its address's ENI (254: main). 0: the node
    routes by destination alone, and the pod needs no rules."""
    masquerade: bool = False
    host_ports: HostPorts | None = None
    meter: Meter | None = None
    sysctls: dict[str, str] = {}
    tuned: dict[str, str | int] = {}
    """Attributes of the pod's interface that were changed, see `tuning`."""
    saved: dict[str, str | int] = {}
    """What they were before."""
    let_through: tuple[Address, ...] = ()
    """Addresses that the iptables firewall accepts."""
    result: str = ""


class Wiring(Protocol):
    """Makes and removes links. Methods may be called from several threads."""

    def host_ifname(self, attachment: Attachment) -> str:
        """The name that `attach` gives to the host end."""
        ...

    def attach(self, attachment: Attachment, netns_fd: int) -> Attachment:
        """Make the link; return the attachment with the MACs and indexes filled in.

        Raises KernelError, ConfigError; then nothing is left.
        """
        ...

    def check(self, attachment: Attachment, netns_fd: int) -> list[str]:
        """How the live state differs from the attachment, one sentence each."""
        ...

    def renew(self, attachment: Attachment) -> None:
        """The pod's end has another MAC now, the attachment's: let the host send to that."""
        ...

    def silence(self, attachment: Attachment) -> None:
        """From the return on the pod neither sends nor receives; its links may remain.

        What is gone already is no error.
        """
        ...

    def purge(self, host_ifnames: Collection[str]) -> None:
        """Remove links (and nothing else), however long the kernel takes."""
        ...

    def links(self) -> Collection[str]:
        """The host ends of all links that this wiring made in this namespace."""
        ...

    def reconcile(self, attachments: Collection[Attachment]) -> None:
        """Remove what a crash left besides links: neighbours, routes, rules of no attachment."""
        ...
