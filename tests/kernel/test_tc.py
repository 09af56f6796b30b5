"""Bandwidth: token buckets and redirection, with pyroute2 as the oracle."""

from __future__ import annotations

import os

from pyroute2 import NetNS

from podwire.kernel import link, tc
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from tests.conftest import present


def test_token_bucket_and_redirection(sock: NetlinkSocket, netns_fd: int) -> None:
    sock.run(link.add_veth(End("a"), End("b"), up=True), link.add_ifb(End("bwp0"), up=True))
    a, ifb = present(sock, "a"), present(sock, "bwp0")
    sock.run(
        tc.add_token_bucket(a.index, 1_000_000, 250_000),
        tc.add_ingress(a.index),
        tc.redirect_ingress(a.index, ifb.index),
        tc.add_token_bucket(ifb.index, 10_000_000_000, 4_000_000),
    )
    root, ingress = tc.dump(sock, a.index)
    assert (root.kind, root.rate_bytes_s, root.burst_bytes) == ("tbf", 1_000_000, 250_000)
    assert ingress.kind == "ingress"
    assert tc.dump(sock, ifb.index)[0].rate_bytes_s == 10_000_000_000
    assert tc.redirections(sock, a.index) == [ifb.index]
    with NetNS(f"/proc/{os.getpid()}/fd/{netns_fd}", flags=0) as ip:
        (seen,) = [q for q in ip.get_qdiscs(index=a.index) if q.get_attr("TCA_KIND") == "tbf"]
    params = seen.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")
    assert (params["rate"], params["limit"]) == (1_000_000, 275_000)
    sock.run(tc.add_token_bucket(a.index, 2_000_000, 250_000))
    assert tc.dump(sock, a.index)[0].rate_bytes_s == 2_000_000
    sock.run(*map(tc.delete_qdisc, tc.dump(sock, a.index)))
    assert "tbf" not in {qdisc.kind for qdisc in tc.dump(sock, a.index)}
