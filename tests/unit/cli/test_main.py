"""The exit status and the one line that a mistake is worth."""

from __future__ import annotations

import re

import pytest

from podwire.cli.main import COMMANDS, main


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("status --run-dir {tmp}/none", 1, "no agent answers at .*/agent.sock: No such file"),
        ("services resolve a/b c --run-dir {tmp}", 1, r"podwire: 'c' needs a port: DST:PORT"),
        ("policy why a/b c/d --run-dir {tmp}", 1, "podwire: 'c/d' needs a port"),
        ("policy why a/b c/d:65536 --run-dir {tmp}", 1, "podwire: 'c/d:65536': ports end at 65535"),
        ("policy why a/b [::1 --run-dir {tmp}", 1, r"podwire: not DST:PORT\[/PROTO\]: '\[::1'"),
        ("bpf progs --seconds 0", 2, "argument --seconds: not between 0 and 3600: 0"),
        ("lab ls --name nobody-has-it", 1, "no lab nobody-has-it: `podwire lab up` makes one"),
        ("install --cni-bin-dir {tmp}/file/bin", 1, r"podwire: .*Not a directory: .*file/bin"),
        ("agent --only=services,tea", 1, "podwire: --only takes services, .* not 'tea'"),
        ("agent --cluster-cidr=1.2.3", 1, "podwire: --cluster-cidr: not an IP address: '1.2.3'"),
        ("tea", 2, "invalid choice: 'tea'"),
        ("", 2, "required: COMMAND"),
        *((f"{command} --help", 0, f"usage: podwire {command}") for command in COMMANDS),
    ],
)
def test_one_line_and_a_status(capsys, tmp_path, words, status, line):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(words.format(tmp=tmp_path).split())
    assert ended.value.code == status
    out, err = capsys.readouterr()
    assert re.search(line, out + err), out + err
    if status == 1:
        assert len((out + err).splitlines()) == 1
