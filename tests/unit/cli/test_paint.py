import pytest

from podwire.cli import paint


def test_columns_align_whether_painted_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paint, "coloured", lambda: True)
    lines = paint.table(["A", "B"], [[paint.paint("red", "long cell"), "1"], ["x", "22"]])
    assert [paint.width(line) for line in lines] == [12, 12, 13]
    assert "\x1b[31mlong cell\x1b[0m  1" in lines[1]


def test_plain_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert paint.table(["A"], [["b"]]) == ["A", "b"]
