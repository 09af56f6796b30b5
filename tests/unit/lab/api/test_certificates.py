"""The lab's authority and server certificate, verified as strictly as OpenSSL can."""

from __future__ import annotations

import ssl

import pytest

from podwire.lab.api import certificates


def _shake_hands(client: ssl.SSLObject, server: ssl.SSLObject, wires: list[ssl.MemoryBIO]) -> None:
    """Both ends of one handshake in memory; raises what either end refuses."""
    from_client, to_server, from_server, to_client = wires
    open_ends = [client, server]
    while open_ends:
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                pass
            to_server.write(from_client.read())
            to_client.write(from_server.read())


@pytest.mark.parametrize("host", ["172.18.0.1", "fd00:18::1", "kubernetes.default.svc"])
def test_a_strict_client_accepts_the_server(tmp_path, host):
    made = certificates.make(["172.18.0.1", "fd00:18::1", "kubernetes.default.svc"])
    trusting = ssl.create_default_context(cadata=made.authority.decode())
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    from_client, to_server, from_server, to_client = wires = [ssl.MemoryBIO() for _ in range(4)]
    client = trusting.wrap_bio(to_client, from_client, server_hostname=host)
    server = made.server_context(tmp_path).wrap_bio(to_server, from_server, server_side=True)
    _shake_hands(client, server, wires)
    assert client.getpeercert()
