"""Which UDP entries of the table are stale: ours, and nobody else's."""

from __future__ import annotations

import pytest

from podwire.conntrack.stale import judge_all, judge_changes
from podwire.kernel.ctnetlink import Entry
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.net import Protocol
from podwire.services import ServiceTable
from podwire.services.stale import StaleFlows
from tests.unit.conntrack.worlds import (
    CLIENT,
    DNS,
    DNS_IP,
    NODE,
    NODE_PORT,
    OUTSIDE,
    SERVICES,
    entry,
    service_port,
    service_table,
)

UDP = Protocol.UDP
EMPTY = service_table(service_port("dns", UDP, DNS_IP, 53, node_port=NODE_PORT))
DELETED = service_table()

TO_DNS = entry(CLIENT, DNS_IP, 53, via=(DNS, 5353), protocol=UDP)
TO_OTHER = entry(CLIENT, DNS_IP, 53, via=("10.244.1.9", 5353), protocol=UDP)
UNTRANSLATED = entry(CLIENT, DNS_IP, 53, protocol=UDP)
BY_NODE_PORT = entry(OUTSIDE, NODE, NODE_PORT, via=(DNS, 5353), protocol=UDP)
OWN_PROGRAM = entry(OUTSIDE, NODE, NODE_PORT, protocol=UDP)
OTHER_PROXY = entry(OUTSIDE, "198.51.100.1", 53, via=(DNS, 5353), protocol=UDP)


def stale(now: ServiceTable, before: ServiceTable, made: Entry) -> bool:
    changes = StaleFlows(now.delta(before).ports.values(), now.settings)
    return judge_changes(changes)(flow_key(made))


@pytest.mark.parametrize(
    ("now", "made", "expected"),
    [
        (EMPTY, TO_DNS, True),
        (EMPTY, TO_OTHER, True),
        (EMPTY, UNTRANSLATED, True),
        (EMPTY, BY_NODE_PORT, True),
        (EMPTY, OWN_PROGRAM, False),
        (EMPTY, OTHER_PROXY, False),
        (DELETED, TO_DNS, True),
        (DELETED, BY_NODE_PORT, True),
        (DELETED, OWN_PROGRAM, False),
        (SERVICES, TO_DNS, False),
    ],
)
def test_after_a_change(now: ServiceTable, made: Entry, expected: bool) -> None:
    assert stale(now, SERVICES, made) is expected


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (TO_DNS, False),
        (TO_OTHER, True),
        (UNTRANSLATED, True),
        (BY_NODE_PORT, False),
        (OWN_PROGRAM, False),
        (OTHER_PROXY, False),
        # a Service that was deleted while no agent ran
        (entry(CLIENT, "10.96.7.7", 53, via=(DNS, 5353), protocol=UDP), True),
        (entry(CLIENT, "10.96.7.7", 53, protocol=UDP), False),
    ],
)
def test_at_a_start(made: Entry, expected: bool) -> None:
    assert judge_all(SERVICES)(flow_key(made)) is expected
