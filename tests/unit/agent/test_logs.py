import logging

import pytest

from podwire.agent.logs import Formatter, event, quote


def test_a_line_is_one_event_with_its_fields() -> None:
    record = logging.LogRecord("podwire.agent", logging.INFO, "", 0, "node ready", None, None)
    record.created, record.msecs = 0.0, 7.0
    record.node = "n 1"
    assert Formatter().format(record) == (
        '1970-01-01T00:00:00.007Z level=info component=agent event="node ready" node="n 1"'
    )


def test_values_are_one_word_or_quoted() -> None:
    assert quote("n1") == "n1"
    assert quote('a "b"\n') == '"a \\"b\\"\\n"'
    assert quote("") == '""'


def test_a_field_may_be_called_anything(caplog: pytest.LogCaptureFixture) -> None:
    event(logging.getLogger("podwire.test"), logging.ERROR, "seen", name="n", process=1, node="x")
    (record,) = caplog.records
    assert (record.name_, record.process_, record.node) == ("n", 1, "x")
