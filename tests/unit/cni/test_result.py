import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.cni.protocol import VERSIONS, CniError
from podwire.cni.result import Dns, Interface, Ip, Result, Route, decode, encode

RESULT = Result(
    interfaces=[Interface("br0", "aa:bb:cc:dd:ee:ff"), Interface("eth0", "", 1400, "/x")],
    ips=[Ip("10.0.0.2/24", "10.0.0.1", 1), Ip("fd00::2/64", "fd00::1", 1)],
    routes=[Route("0.0.0.0/0", "10.0.0.1", mtu=1300), Route("::/0", "fd00::1")],
    dns=Dns(nameservers=["192.0.2.1"]),
)


def test_the_newest_form_has_everything():
    document = encode(RESULT, "1.1.0")
    assert document["interfaces"][1] == {"name": "eth0", "mtu": 1400, "sandbox": "/x"}
    assert document["routes"][0] == {"dst": "0.0.0.0/0", "gw": "10.0.0.1", "mtu": 1300}


def test_what_1_0_0_does_not_know_is_left_out():
    document = encode(RESULT, "1.0.0")
    assert document["interfaces"][1] == {"name": "eth0", "sandbox": "/x"}
    assert document["routes"][0] == {"dst": "0.0.0.0/0", "gw": "10.0.0.1"}
    assert "version" not in document["ips"][0]


def test_addresses_have_a_version_before_1_0_0():
    assert [each["version"] for each in encode(RESULT, "0.4.0")["ips"]] == ["4", "6"]


def test_the_oldest_form():
    assert encode(RESULT, "0.2.0") == {
        "cniVersion": "0.2.0",
        "ip4": {
            "ip": "10.0.0.2/24",
            "gateway": "10.0.0.1",
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}],
        },
        "ip6": {
            "ip": "fd00::2/64",
            "gateway": "fd00::1",
            "routes": [{"dst": "::/0", "gw": "fd00::1"}],
        },
        "dns": {"nameservers": ["192.0.2.1"]},
    }


@pytest.mark.parametrize("ips", [[], [Ip("10.0.0.2/24"), Ip("10.0.1.2/24")]])
def test_the_oldest_form_holds_one_address_of_each_family(ips):
    with pytest.raises(CniError) as caught:
        encode(Result(ips=ips), "0.2.0")
    assert caught.value.code == 104


@given(
    st.builds(
        Result,
        ips=st.lists(
            st.builds(Ip, st.sampled_from(["10.0.0.2/24", "fd00::2/64"]), st.just(""), st.just(0)),
            max_size=3,
        ),
        interfaces=st.lists(st.builds(Interface, st.text(max_size=5)), max_size=3),
    ),
    st.sampled_from([version for version in VERSIONS if version >= "0.3.0"]),
)
def test_a_result_comes_back(result, version):
    assert decode(encode(result, version), "0.1.0") == result


@pytest.mark.parametrize("document", [5, [], "x", {"cniVersion": "7"}, {"ips": [{"x": 1}]}])
def test_nonsense_is_refused(document):
    with pytest.raises(CniError):
        decode(document, "1.0.0")
