"""What is asked for, as filters for the kernel and as a judgement."""

from __future__ import annotations

import pytest

from podwire.conntrack.selection import parse
from podwire.errors import InvalidObject
from podwire.kernel.ctnetlink import Entry, Usage
from podwire.net import Protocol
from tests.unit.conntrack.worlds import (
    CLIENT,
    DNS,
    DNS_IP,
    NAMES,
    NODE,
    NODE_PORT,
    OUTSIDE,
    WEB,
    WEB_IP,
    entry,
)

UDP = Protocol.UDP
DIRECT = entry(CLIENT, WEB, 8080)
THROUGH = entry(CLIENT, WEB_IP, 80, via=(WEB, 8080))
QUESTION = entry(CLIENT, DNS_IP, 53, via=(DNS, 5353), protocol=UDP, answered=False)
EGRESS = entry(CLIENT, OUTSIDE, 443, snat=NODE)
NODE_PORTED = entry(OUTSIDE, NODE, NODE_PORT, via=(DNS, 5353), protocol=UDP)
HAIRPIN = entry(WEB, WEB_IP, 80, via=(WEB, 8080))
ALL = [DIRECT, THROUGH, QUESTION, EGRESS, NODE_PORTED, HAIRPIN]


class Entries:
    """A source that filters as the kernel does."""

    name = "kernel"

    def usage(self) -> Usage:
        return Usage(len(ALL), 100)

    def entries(self, filter_):
        return (each for each in ALL if filter_.fits(each))


def chosen(**query: str) -> list[Entry]:
    return list(parse(query).entries(Entries(), NAMES))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ALL),
        ({"pod": "web"}, [DIRECT, THROUGH, HAIRPIN]),
        ({"pod": "kube-system/dns"}, [QUESTION, NODE_PORTED]),
        ({"service": "dns"}, [QUESTION, NODE_PORTED]),
        ({"service": "web", "protocol": "tcp"}, [THROUGH, HAIRPIN]),
        ({"namespace": "kube-system"}, [QUESTION, NODE_PORTED]),
        ({"address": WEB_IP}, [THROUGH, HAIRPIN]),
        ({"address": NODE}, [EGRESS, NODE_PORTED]),
        ({"target": WEB}, [DIRECT, THROUGH, HAIRPIN]),
        ({"target": f"{DNS}:5353", "protocol": "UDP"}, [QUESTION, NODE_PORTED]),
        ({"target": f"{DNS}:53"}, []),
        ({"state": "unreplied"}, [QUESTION]),
        ({"state": "established"}, [DIRECT, THROUGH, EGRESS, HAIRPIN]),
        ({"kind": "egress"}, [EGRESS]),
    ],
)
def test_selections(query: dict[str, str], expected: list[Entry]) -> None:
    found = chosen(**query)
    assert sorted(found) == sorted(expected)
    assert len(found) == len(set(found))  # each once


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"protocol": "tpc"}, "not a protocol"),
        ({"kind": "pod"}, "not a kind"),
        ({"address": "10.0.0"}, "not an IP address"),
        ({"target": "10.0.0.1:http"}, "ADDRESS\\[:PORT\\]"),
        ({"pod": "nobody"}, "Pod default/nobody"),
        ({"service": "nothing"}, "Service default/nothing"),
    ],
)
def test_mistakes_get_a_sentence(query: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidObject, match=sentence):
        chosen(**query)


def test_only_exact_selections_may_be_flushed_by_filter() -> None:
    assert parse({"pod": "web"}).exact
    assert parse({"state": "unreplied"}).exact
    assert not parse({"state": "established"}).exact
    assert not parse({"namespace": "default"}).exact
    assert not parse({})
