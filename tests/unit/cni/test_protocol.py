import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.cni import protocol, wire
from podwire.cni.protocol import CniError, answer_version, parse_args, parse_call

ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
}
CONFIG = {"cniVersion": "1.1.0", "name": "net", "type": "podwire"}
SHIM = Path(protocol.__file__).with_name("shim.c").read_text()


def refused(environment=(), config=(), stdin=None):
    environment = {**ENVIRONMENT, **dict(environment)}
    text = json.dumps({**CONFIG, **dict(config)}) if stdin is None else stdin
    with pytest.raises(CniError) as caught:
        parse_call("podwire", environment, text.encode())
    return caught.value


def test_a_call_is_read_whole():
    call = parse_call(
        "podwire",
        {**ENVIRONMENT, "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web-0;FOO=bar"},
        json.dumps(CONFIG).encode(),
    )
    assert (call.command, call.container, call.ifname) == ("ADD", "c1", "eth0")
    assert (call.network, call.version) == ("net", "1.1.0")
    assert call.args["K8S_POD_NAME"] == "web-0"


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"CNI_COMMAND": ""}, 4, "CNI_COMMAND"),
        ({"CNI_COMMAND": "NOPE"}, 4, "unknown CNI_COMMAND: NOPE"),
        (
            {"CNI_NETNS": "", "CNI_IFNAME": "", "CNI_PATH": ""},
            4,
            "required env variables [CNI_NETNS,CNI_IFNAME,CNI_PATH] missing",
        ),
        ({"CNI_COMMAND": "GC", "CNI_PATH": ""}, 4, "CNI_PATH"),
        ({"CNI_COMMAND": "DEL", "CNI_CONTAINERID": ""}, 4, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "some-%%container-id"}, 4, "invalid characters in containerID"),
        ({"CNI_CONTAINERID": "c\n"}, 4, "invalid characters in containerID"),
        ({"CNI_IFNAME": "1234567890123456"}, 4, "too long"),
        ({"CNI_IFNAME": ".."}, 4, ". or .."),
        ({"CNI_IFNAME": "eth/0"}, 4, "interface name contains"),
        ({"CNI_IFNAME": "eth 0"}, 4, "interface name contains"),
        ({"CNI_ARGS": "FOO=bar"}, 4, "unknown args"),
        ({"CNI_ARGS": "FOO"}, 4, "invalid pair"),
        ({"CNI_ARGS": "IgnoreUnknown=perhaps"}, 4, "IgnoreUnknown"),
    ],
)
def test_environment_errors(environment, code, message):
    error = refused(environment)
    assert error.code == code
    assert message in error.message


@pytest.mark.parametrize(
    ("config", "command", "code"),
    [
        ({"name": ""}, "ADD", 7),
        ({"name": "a b"}, "ADD", 7),
        ({"name": 7}, "ADD", 7),
        ({"cniVersion": "9.9.9"}, "ADD", 1),
        ({"cniVersion": "adsf"}, "ADD", 6),
        ({"cniVersion": "adsf"}, "STATUS", 6),
        ({"cniVersion": 1}, "CHECK", 6),
        ({"cniVersion": "0.3.1"}, "CHECK", 1),
        ({"cniVersion": "1.0.0"}, "GC", 1),
        ({"cniVersion": "1.0.0"}, "STATUS", 1),
        ({"cniVersion": None}, "STATUS", 1),
    ],
)
def test_configuration_errors(config, command, code):
    assert refused({"CNI_COMMAND": command}, config).code == code


@pytest.mark.parametrize("stdin", ["", "this is not json", "[1]", "null", "{", "[" * 5000])
def test_what_is_no_object_is_no_configuration(stdin):
    assert refused(stdin=stdin).code == 6


def test_an_absent_version_is_the_oldest():
    text = json.dumps({"name": "net", "type": "podwire"}).encode()
    assert parse_call("podwire", ENVIRONMENT, text).version == "0.1.0"
    assert answer_version(text) == "0.1.0"
    assert answer_version(b"nonsense") == "1.1.0"


def test_errors_carry_their_version():
    document = json.loads(CniError(7, "no", "because").encode("0.4.0"))
    assert document == {"cniVersion": "0.4.0", "code": 7, "msg": "no", "details": "because"}


@given(st.text(max_size=30))
def test_arguments_are_read_or_refused(text):
    code, pairs = 4, {}
    try:
        pairs = parse_args(text)
    except CniError as error:
        code = error.code
    assert code == 4
    assert all(pairs)


@given(st.binary(max_size=200))
def test_any_input_is_a_call_or_an_error(data):
    code = 6
    try:
        parse_call("podwire", ENVIRONMENT, data)
    except CniError as error:
        code = error.code
    assert code in (1, 6, 7)


def test_the_shim_knows_the_same_versions():
    answer = re.search(r"define VERSION_ANSWER(.*?)\n\n", SHIM, re.S)[1]
    own, *supported = re.findall(r'\\"(\d\.\d\.\d)\\"', answer)
    assert tuple(supported) == protocol.VERSIONS
    assert own == protocol.NEWEST
    assert f"#define WIRE_VERSION {wire.VERSION}\n" in SHIM


def test_frames():
    body = b"podwire\0CNI_COMMAND=ADD\0CNI_ARGS=\0\0{}\0\0"
    frame = wire.decode(body)
    assert frame.plugin == "podwire"
    assert frame.environment == {"CNI_COMMAND": "ADD", "CNI_ARGS": ""}
    assert frame.stdin == b"{}\0\0"
    with pytest.raises(wire.Malformed):
        wire.decode(b"podwire\0")
    with pytest.raises(wire.Malformed):
        wire.decode_left(b"short")
