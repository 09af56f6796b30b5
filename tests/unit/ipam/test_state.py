import sqlite3

import pytest

from podwire.errors import ConfigError
from podwire.ipam.pool import Cursor, Resting
from podwire.ipam.state import State
from podwire.net import parse_address, parse_prefix
from podwire.wiring import Attachment, Bridge, HostPort, HostPorts, Key, Pod, PodAddress, PodRoute

ADDRESS = PodAddress(parse_address("10.0.0.2"), 24, parse_address("10.0.0.1"))
ATTACHMENT = Attachment(
    key=Key("net", "c1", "eth0"),
    pod=Pod("default", "web-0", "u"),
    pool="net",
    addresses=(ADDRESS, PodAddress(parse_address("fd00::2"), 64)),
    routes=(PodRoute(parse_prefix("0.0.0.0/0"), ADDRESS.gateway),),
    mac=b"\x0a\x58\0\0\0\2",
    wiring="bridge",
    host_ifname="pw0123",
    bridge=Bridge(name="podwire0", gateway=True),
    host_ports=HostPorts(ports=(HostPort(8080, 80, 6),), targets=(ADDRESS,)),
    result='{"a":1}',
)


def test_an_attachment_comes_back_as_it_was(tmp_path):
    state = State(tmp_path / "podwire.db", "boot")
    state.add(ATTACHMENT, [Cursor("net", 0, 32, 0x0A000002)], 0)
    state.close()
    again = State(tmp_path / "podwire.db", "boot")
    assert again.attachments() == [ATTACHMENT]
    assert again.cursors() == [Cursor("net", 0, 32, 0x0A000002)]


def test_removal_leaves_resting_addresses_and_a_link_to_remove(tmp_path):
    state = State(tmp_path / "podwire.db", "boot")
    state.add(ATTACHMENT, [], 0)
    state.remove(ATTACHMENT, 30)
    assert state.attachments() == []
    assert [r.address for r in state.resting()] == [a.address for a in ATTACHMENT.addresses]
    assert state.removals() == [("bridge", "pw0123")]
    state.removed([("bridge", "pw0123")])
    assert state.removals() == []
    state.add(ATTACHMENT, [], 30)
    assert state.resting() == []


def test_a_reboot_empties_it(tmp_path):
    state = State(tmp_path / "podwire.db", "one")
    state.add(ATTACHMENT, [], 0)
    state.remove(ATTACHMENT, 5)
    state.add(ATTACHMENT, [], 0)
    state.close()
    again = State(tmp_path / "podwire.db", "two")
    assert (again.attachments(), again.resting(), again.removals()) == ([], [], [])


def test_all_or_nothing(tmp_path):
    state = State(tmp_path / "podwire.db", "boot")

    def fail_half_way():
        with state.transaction() as db:
            db.execute("INSERT INTO resting VALUES ('p', x'00', 1)")
            db.execute("nonsense")

    with pytest.raises(sqlite3.OperationalError):
        fail_half_way()
    assert state.resting() == []
    state.add(ATTACHMENT, [], 0)
    assert Resting("p", b"\0", 1) not in state.resting()


def test_foreign_files_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "bad.db").write_text("this is no database, by any means" * 100)
    with pytest.raises(ConfigError, match="cannot use the state file"):
        State(tmp_path / "bad.db", "boot")
    db = sqlite3.connect(tmp_path / "new.db")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(ConfigError, match="newer podwire"):
        State(tmp_path / "new.db", "boot")
