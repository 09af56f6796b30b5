"""Bodies that kubectl 1.33 sent, and the objects that its --dry-run printed for them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.api.protobuf import decode
from podwire.lab.api.status import StatusError

CASES = json.loads((Path(__file__).parent / "data/kubectl-create.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["command"])
def test_decode(case):
    assert decode(bytes.fromhex(case["body"])) == case["object"]


def test_a_field_that_is_not_known_is_never_lost():
    body = bytearray(bytes.fromhex(CASES[0]["body"]))  # a Namespace
    at = body.index(b"\x0a\x02a1")
    body[at] = 31 << 3 | 2 & 0x7F
    with pytest.raises(StatusError) as refused:
        decode(bytes(body))
    assert refused.value.status in (400, 415)


@pytest.mark.parametrize("body", [b"", b"k8s", b"{}", b"k8s\0\x0a"])
def test_what_is_no_protobuf(body):
    with pytest.raises(StatusError) as refused:
        decode(body)
    assert refused.value.status in (400, 415)


@given(st.sampled_from(CASES), st.integers(4, 200), st.binary(min_size=1, max_size=3))
def test_damage_is_refused_or_gives_an_object(case, at, damage):
    body = bytes.fromhex(case["body"])
    try:
        decode(body[:at] + damage + body[at + len(damage) :])
    except StatusError as error:
        assert error.status in (400, 415)  # noqa: PT017 (most damage gives an object)
