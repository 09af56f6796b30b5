"""Structured logs: one event per line, ``key=value`` after the message, quiet when all is well."""

from __future__ import annotations

import logging
import sys
import time

# what every record has; the rest are the event's own fields
_RECORD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@%+,[]")


def quote(value: object) -> str:
    """The value as it stands in a log line: quoted when it holds blanks or quotes."""
    text = str(value)
    if text and all(character in _PLAIN for character in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class Formatter(logging.Formatter):
    """``2026-01-02T03:04:05.678Z level=info component=agent event="node ready" node=n1``."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "level": record.levelname.lower(),
            "component": record.name.removeprefix("podwire."),
            "event": record.getMessage(),
            **{k: v for k, v in record.__dict__.items() if k not in _RECORD},
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            fields["trace"] = self.formatException(record.exc_info)
        line = " ".join(f"{name}={quote(value)}" for name, value in fields.items())
        return f"{stamp}.{int(record.msecs):03d}Z {line}"


def setup(level: str = "info") -> None:
    """Log to standard error. `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("podwire").setLevel(level.upper())


def event(logger: logging.Logger, level: int, message: str, **fields: object) -> None:
    """Log one event with its fields; one named as a record's own attribute gets a ``_`` behind."""
    extra = {f"{name}_" if name in _RECORD else name: value for name, value in fields.items()}
    logger.log(level, message, extra=extra)
