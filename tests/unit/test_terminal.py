"""Columns, colours and what is left of them where nobody looks."""

import pytest

from podwire import terminal


def test_columns_align_whether_painted_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "coloured", lambda: True)
    lines = terminal.table(["A", "B"], [[terminal.paint("red", "long cell"), "1"], ["x", "22"]])
    assert [terminal.width(line) for line in lines] == [12, 12, 13]
    assert "\x1b[31mlong cell\x1b[0m  1" in lines[1]
    assert terminal.align([]) == []


def test_plain_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.table(["A"], [["b"]]) == ["A", "b"]
    assert terminal.paint("red", "x") == "x"
    terminal.progress("half way")
    terminal.clear()
    assert capsys.readouterr().out == ""
