"""Traffic control for the bandwidth of a pod: token buckets, and redirection of what comes in.

A token bucket shapes what leaves a link. What a pod sends comes *in* on the host end of its veth
pair, so it is redirected to an ifb link and shaped there.

Source: tc-tbf(8), tc-u32(8), tc-mirred(8); include/uapi/linux/{pkt_sched,pkt_cls}.h.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from podwire.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    Request,
    attr,
    attributes,
    nest,
    number,
    string,
    text,
    u32,
    u64,
)

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_GETTFILTER = 44, 46
_TCMSG = struct.Struct("=B3xiIII")  # family, link index, handle, parent, info
_RATESPEC = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, mpu, rate
_KIND, _OPTIONS = 1, 2
_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_U32_CLASSID, _U32_SEL, _U32_ACT = 1, 5, 7
_ACT_KIND, _ACT_OPTIONS, _MIRRED_PARMS = 1, 2, 2
_ETHERNET = 1  # a link layer that the kernel computes rates for without a table

ROOT = 0xFFFFFFFF
INGRESS = 0xFFFFFFF1
_INGRESS_HANDLE = 0xFFFF0000
_ETH_P_ALL = 3
_TICK_NS = 64
_LATENCY_S = 0.025  # the reference bandwidth plugin's


class Qdisc(NamedTuple):
    """`rate_bytes_s` and `burst_bytes` are 0 for other kinds than tbf."""

    link: int
    kind: str
    handle: int
    parent: int
    rate_bytes_s: int = 0
    burst_bytes: int = 0


def add_token_bucket(link: int, rate_bytes_s: int, burst_bytes: int) -> Request:
    """Make or replace the link's root: `rate_bytes_s` with bursts, 25 ms of queue beyond them."""
    limit = min(int(rate_bytes_s * _LATENCY_S) + burst_bytes, 0xFFFFFFFF)
    rate = _RATESPEC.pack(0, _ETHERNET, 0, 0, 0, min(rate_bytes_s, 0xFFFFFFFF))
    # struct tc_tbf_qopt: rate, peak rate, limit, buffer (superseded by TCA_TBF_BURST), MTU
    options = [attr(_TBF_PARMS, rate + bytes(12) + struct.pack("=III", limit, 0, 0))]
    options.append(u32(_TBF_BURST, burst_bytes))
    if rate_bytes_s > 0xFFFFFFFF:
        options.append(u64(_TBF_RATE64, rate_bytes_s))
    body = _TCMSG.pack(0, link, 0x10000, ROOT, 0) + text(_KIND, "tbf") + nest(_OPTIONS, *options)
    what = f"limit link {link} to {rate_bytes_s} bytes/s"
    return Request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body, what)


def add_ingress(link: int) -> Request:
    """Give the link a place for filters on what comes in; EEXIST when it has one."""
    body = _TCMSG.pack(0, link, _INGRESS_HANDLE, INGRESS, 0) + text(_KIND, "ingress")
    return Request(
        RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body, f"add an ingress qdisc to link {link}"
    )


def delete_qdisc(qdisc: Qdisc) -> Request:
    body = _TCMSG.pack(0, qdisc.link, qdisc.handle, qdisc.parent, 0)
    return Request(RTM_DELQDISC, 0, body, f"delete the {qdisc.kind} qdisc of link {qdisc.link}")


def redirect_ingress(link: int, target: int) -> Request:
    """Send everything that comes in on `link` (with an ingress qdisc) out of `target`."""
    every = struct.pack("=BBBxHHhhI", 1, 0, 1, 0, 0, 0, 0, 0) + bytes(16)  # one key, mask 0
    stolen, egress_redirect = 4, 1
    mirred = struct.pack("=IIiiiiI", 0, 0, stolen, 0, 0, egress_redirect, target)
    action = text(_ACT_KIND, "mirred") + nest(_ACT_OPTIONS, attr(_MIRRED_PARMS, mirred))
    options = nest(
        _OPTIONS,
        u32(_U32_CLASSID, 0x10001),
        attr(_U32_SEL, every),
        nest(_U32_ACT, nest(1, action)),
    )
    info = 1 << 16 | socket.htons(_ETH_P_ALL)  # priority 1
    body = _TCMSG.pack(0, link, 0, _INGRESS_HANDLE, info) + text(_KIND, "u32") + options
    what = f"redirect what comes in on link {link} to link {target}"
    return Request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, body, what)


def dump(sock: NetlinkSocket, link: int) -> list[Qdisc]:
    """The qdiscs of a link."""
    body = _TCMSG.pack(0, link, 0, 0, 0)
    qdiscs = map(_parse, sock.dump(RTM_GETQDISC, body, "qdiscs"))
    return [qdisc for qdisc in qdiscs if qdisc.link == link]


def redirections(sock: NetlinkSocket, link: int) -> list[int]:
    """The links that what comes in on `link` is redirected to."""
    body = _TCMSG.pack(0, link, 0, _INGRESS_HANDLE, 0)
    found: list[int] = []
    for reply in sock.dump(RTM_GETTFILTER, body, "filters"):
        options = attributes(attributes(reply, _TCMSG.size).get(_OPTIONS, b""))
        for action in attributes(options.get(_U32_ACT, b"")).values():
            parms = attributes(attributes(action).get(_ACT_OPTIONS, b"")).get(_MIRRED_PARMS)
            if parms:
                found.append(number(parms[24:28]))
    return found


def _parse(body: bytes) -> Qdisc:
    _, link, handle, parent, _ = _TCMSG.unpack_from(body)
    found = attributes(body, _TCMSG.size)
    kind = string(found.get(_KIND, b""))
    if kind != "tbf":
        return Qdisc(link, kind, handle, parent)
    options = attributes(found.get(_OPTIONS, b""))
    rate, _limit, buffer, _mtu = struct.unpack_from("=8xI12xIII", options[_TBF_PARMS])
    rate = number(options.get(_TBF_RATE64, b"")) or rate
    # The kernel keeps the burst as the time it takes; half a byte brings the rounding home.
    burst = int(buffer * _TICK_NS * rate / 1e9 + 0.5)
    return Qdisc(link, kind, handle, parent, rate, burst)
