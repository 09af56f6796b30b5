"""The cluster's DNS, read by another implementation (dnslib)."""

import asyncio
import socket
import struct

import pytest
from dnslib import EDNS0, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from podwire.kube.objects import (
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    Metadata,
    Namespace,
    Service,
    ServicePort,
    ServiceSpec,
)
from podwire.kube.store import Store
from podwire.lab.dns import DnsServer, Zone


def meta(name: str, namespace: str = "shop", **labels: str) -> Metadata:
    return Metadata(name=name, namespace=namespace, labels=labels)


def service(name: str, ips: list[str], **spec) -> Service:
    ports = spec.pop("ports", [ServicePort(name="http", port=80)])
    body = ServiceSpec(cluster_ip=ips[0] if ips else "", cluster_ips=ips, ports=ports, **spec)
    return Service(metadata=meta(name), spec=body)


def slice_of(name: str, *endpoints: Endpoint, family: str = "IPv4") -> EndpointSlice:
    return EndpointSlice(
        metadata=Metadata(
            name=f"{name}-{family.lower()}",
            namespace="shop",
            labels={"kubernetes.io/service-name": name},
        ),
        address_type=family,
        endpoints=list(endpoints),
        ports=[EndpointPort(name="sql", port=5432, protocol="TCP")],
    )


def endpoint(address: str, hostname: str | None = None, ready: bool | None = True) -> Endpoint:
    return Endpoint(
        addresses=[address], hostname=hostname, conditions=EndpointConditions(ready=ready)
    )


@pytest.fixture
def store():
    store = Store()
    store.put(Namespace(metadata=Metadata(name="shop")))
    store.put(service("web", ["10.96.0.7", "fd00:96::7"]))
    store.put(service("db", ["None"]))
    store.put(
        slice_of(
            "db",
            endpoint("10.244.0.5", "db-0"),
            endpoint("10.244.1.5", "db-1"),
            endpoint("10.244.1.6"),
            endpoint("10.244.1.7", "db-3", ready=False),
        )
    )
    store.put(slice_of("db", endpoint("fd00:244::5", "db-0"), family="IPv6"))
    store.put(service("empty", ["None"]))
    store.put(service("away", [], type="ExternalName", external_name="db.example.com"))
    store.put(
        service("inside", [], type="ExternalName", external_name="web.shop.svc.cluster.local")
    )
    return store


@pytest.fixture
def zone(store):
    zone = Zone(hosts={"outside.example": ["192.0.2.9"]})
    zone.update(store.take())
    return zone


def ask(zone: Zone, name: str, type: str = "A", *, udp: bool = True, **more) -> DNSRecord:
    question = DNSRecord.question(name, type)
    if more:
        question.add_ar(EDNS0(**more))
    answer = DNSRecord.parse(zone.answer(bytes(question.pack()), udp=udp))
    assert answer.header.id == question.header.id
    assert answer.header.rd == 1
    return answer


def answers(zone: Zone, name: str, type: str = "A") -> list[str]:
    reply = ask(zone, name, type)
    assert reply.header.rcode == 0
    return sorted(str(record.rdata) for record in reply.rr)


SHOP = "shop.svc.cluster.local"


@pytest.mark.parametrize(
    ("name", "type", "expected"),
    [
        (f"web.{SHOP}", "A", ["10.96.0.7"]),
        (f"web.{SHOP}", "AAAA", ["fd00:96::7"]),
        (f"WeB.{SHOP}.", "A", ["10.96.0.7"]),
        (f"web.{SHOP}", "TXT", []),
        (f"web.{SHOP}", "SRV", [f"0 100 80 web.{SHOP}."]),
        (f"_http._tcp.web.{SHOP}", "SRV", [f"0 100 80 web.{SHOP}."]),
        (f"_http._tcp.web.{SHOP}", "A", []),
        (f"_tcp.web.{SHOP}", "A", []),
        (f"db.{SHOP}", "A", ["10.244.0.5", "10.244.1.5", "10.244.1.6"]),
        (f"db.{SHOP}", "AAAA", ["fd00:244::5"]),
        (f"db-0.db.{SHOP}", "A", ["10.244.0.5"]),
        (f"db-0.db.{SHOP}", "AAAA", ["fd00:244::5"]),
        (f"db-1.db.{SHOP}", "AAAA", []),
        (f"10-244-1-6.db.{SHOP}", "A", ["10.244.1.6"]),
        (
            f"_sql._tcp.db.{SHOP}",
            "SRV",
            [f"0 100 5432 {host}.db.{SHOP}." for host in ("10-244-1-6", "db-0", "db-1")],
        ),
        (f"away.{SHOP}", "A", ["db.example.com."]),
        (f"inside.{SHOP}", "A", ["10.96.0.7", f"web.{SHOP}."]),
        ("10-9-8-7.shop.pod.cluster.local", "A", ["10.9.8.7"]),
        ("fd00--1.shop.pod.cluster.local", "AAAA", ["fd00::1"]),
        (SHOP, "A", []),
        ("svc.cluster.local", "A", []),
        ("dns-version.cluster.local", "TXT", ['"1.1.0"']),
        ("7.0.96.10.in-addr.arpa", "PTR", [f"web.{SHOP}."]),
        ("5.0.244.10.in-addr.arpa", "PTR", [f"db-0.db.{SHOP}."]),
        ("outside.example", "A", ["192.0.2.9"]),
        ("outside.example", "AAAA", []),
    ],
)
def test_answers(zone, name, type, expected):
    assert answers(zone, name, type) == expected


@pytest.mark.parametrize(
    "name",
    [
        f"nobody.{SHOP}",
        f"x.web.{SHOP}",
        f"_ftp._tcp.web.{SHOP}",
        f"_http._udp.web.{SHOP}",
        f"empty.{SHOP}",
        f"db-3.db.{SHOP}",
        "web.other.svc.cluster.local",
        "other.svc.cluster.local",
        "10-9-8-7.other.pod.cluster.local",
        "no-address.shop.pod.cluster.local",
        "nonsense.cluster.local",
        "9.9.9.10.in-addr.arpa",
        "300.0.96.10.in-addr.arpa",
        f"example.com.{SHOP}",
    ],
)
def test_names_that_do_not_exist(zone, name):
    reply = ask(zone, name)
    assert reply.header.rcode == 3
    assert [record.rtype for record in reply.auth] == [6], "SOA, so that it can be cached"


def test_an_existing_name_without_that_type_is_no_error(zone):
    reply = ask(zone, f"web.{SHOP}", "MX")
    assert (reply.header.rcode, reply.rr, reply.header.aa) == (0, [], 1)
    assert [record.rtype for record in reply.auth] == [6]


def test_ipv6_reverse(zone):
    name = socket.inet_pton(socket.AF_INET6, "fd00:96::7").hex()[::-1]
    assert answers(zone, ".".join(name) + ".ip6.arpa", "PTR") == [f"web.{SHOP}."]


def test_srv_brings_the_addresses_along(zone):
    extra = {(str(r.rname), str(r.rdata)) for r in ask(zone, f"_sql._tcp.db.{SHOP}", "SRV").ar}
    assert (f"db-0.db.{SHOP}.", "10.244.0.5") in extra
    assert (f"db-0.db.{SHOP}.", "fd00:244::5") in extra


@pytest.mark.parametrize("name", ["example.com", "cluster.local.example.com", "local"])
def test_others_names_are_refused(zone, name):
    assert ask(zone, name).header.rcode == 5


def test_changes_are_followed(store, zone):
    store.put(service("web", ["10.96.0.8"]))
    store.remove(EndpointSlice, ("shop", "db-ipv4"))
    store.remove(Namespace, ("", "shop"))
    zone.update(store.take())
    assert answers(zone, f"web.{SHOP}") == ["10.96.0.8"]
    assert ask(zone, "7.0.96.10.in-addr.arpa", "PTR").header.rcode == 3
    assert ask(zone, "5.0.244.10.in-addr.arpa", "PTR").header.rcode == 3
    assert answers(zone, f"db.{SHOP}", "AAAA") == ["fd00:244::5"]
    assert ask(zone, "10-9-8-7.shop.pod.cluster.local").header.rcode == 3


def many(store: Store, zone: Zone, count: int) -> None:
    store.put(slice_of("db", *(endpoint(f"10.244.{i // 200}.{i % 200}") for i in range(count))))
    zone.update(store.take())


def test_a_reply_that_does_not_fit_asks_for_tcp(store, zone):
    many(store, zone, 100)
    short = ask(zone, f"db.{SHOP}")
    assert short.header.tc == 1
    assert 0 < len(short.rr) < 100
    assert len(short.pack()) <= 512
    bigger = ask(zone, f"db.{SHOP}", udp_len=4096)
    assert bigger.header.tc == 1
    assert len(short.rr) < len(bigger.rr) < 100
    whole = ask(zone, f"db.{SHOP}", udp=False)
    assert (whole.header.tc, len(whole.rr)) == (0, 100)


def test_edns(zone):
    reply = ask(zone, f"web.{SHOP}", udp_len=1400)
    assert [record.rtype for record in reply.ar] == [41]
    assert [r.rtype for r in ask(zone, f"web.{SHOP}").ar] == [], "only for those who speak it"
    question = DNSRecord.question(f"web.{SHOP}")
    question.add_ar(EDNS0(version=1))
    reply = DNSRecord.parse(zone.answer(bytes(question.pack())))
    assert reply.ar[0].ttl >> 24 == 1, "BADVERS"


def test_what_is_no_question(zone):
    good = bytes(DNSRecord.question(f"web.{SHOP}").pack())
    assert zone.answer(b"") == b""
    assert zone.answer(good[:2] + b"\x80\x00" + good[4:]) == b"", "a reply is never answered"
    two = good[:4] + b"\0\2" + good[6:]
    assert DNSRecord.parse(zone.answer(two)).header.rcode == 1
    assert DNSRecord.parse(zone.answer(good[:-3])).header.rcode == 1
    notify = good[:2] + b"\x20\x00" + good[4:]
    assert DNSRecord.parse(zone.answer(notify)).header.rcode == 4
    chaos = good[:-2] + struct.pack("!H", 3)
    assert DNSRecord.parse(zone.answer(chaos)).header.rcode == 5


@given(st.binary(max_size=80))
def test_any_bytes_get_an_answer_or_silence(packet):
    answer = Zone().answer(packet)
    if answer:
        assert answer[:2] == packet[:2]
        DNSRecord.parse(answer)


@given(st.integers(0, 40), st.binary(max_size=3), st.booleans())
def test_a_damaged_query_gets_an_answer_or_silence(at, damage, udp):
    good = bytes(DNSRecord.question(f"web.{SHOP}").pack())
    answer = Zone().answer(good[:at] + damage + good[at + len(damage) :], udp=udp)
    assert not answer or answer[2] & 0x80


def test_on_sockets(zone, store):
    many(store, zone, 100)

    async def play():
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        tcp = socket.create_server(("127.0.0.1", 0))
        server = DnsServer(zone, [udp], [tcp])
        await server.start()
        try:
            question = bytes(DNSRecord.question(f"db.{SHOP}").pack())
            short = await asyncio.to_thread(_ask_udp, udp.getsockname(), question)
            assert DNSRecord.parse(short).header.tc == 1
            reader, writer = await asyncio.open_connection(*tcp.getsockname())
            for _ in range(2):  # one connection, many questions
                writer.write(struct.pack("!H", len(question)) + question)
                (size,) = struct.unpack("!H", await reader.readexactly(2))
                whole = DNSRecord.parse(await reader.readexactly(size))
                assert len(whole.rr) == 100
            writer.close()
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(play(), 10))


def _ask_udp(address, question: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(question, address)
        return client.recv(4096)
