"""What must outlive the agent: attachments, resting addresses, links still to be removed. SQLite.

One transaction per ADD or DEL, committed before the runtime is answered, so a crash at any
instruction loses no confirmed pod; what it leaves in the kernel is in no row and is found at the
next start. A file of another boot is emptied: no pod has outlived a reboot.

``synchronous=NORMAL``: a commit survives the death of the process, not of the machine, after which
the file is emptied anyway.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Collection, Generator, Iterable
from pathlib import Path

import msgspec

from podwire.errors import ConfigError
from podwire.ipam.pool import Cursor, Resting
from podwire.wiring import Attachment, Key

FORMAT = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_TABLES = """
CREATE TABLE boot(id TEXT NOT NULL);
CREATE TABLE attachments(
  network TEXT, container TEXT, ifname TEXT, plugin TEXT, record BLOB NOT NULL,
  PRIMARY KEY (network, container, ifname, plugin)) WITHOUT ROWID;
CREATE TABLE resting(
  pool TEXT, address BLOB, until REAL NOT NULL, PRIMARY KEY (pool, address)) WITHOUT ROWID;
CREATE INDEX resting_until ON resting(until);
CREATE TABLE cursors(
  pool TEXT, set_index INTEGER, bits INTEGER, last BLOB NOT NULL,
  PRIMARY KEY (pool, set_index, bits)) WITHOUT ROWID;
CREATE TABLE removals(wiring TEXT, link TEXT, PRIMARY KEY (wiring, link)) WITHOUT ROWID;
"""
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Attachment).decode


class State:
    """The file. Methods may be called from any thread."""

    def __init__(self, path: Path, boot_id: str | None = None) -> None:
        """Open or make it. Raises ConfigError when it is unreadable or of a newer podwire."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        self._lock = threading.Lock()
        boot = boot_id if boot_id is not None else BOOT_ID.read_text().strip()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._prepare(boot)
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"cannot use the state file {path}: {error}; "
                "if no pod runs on this node, delete it and start again"
            ) from None

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Generator[sqlite3.Connection, None, None]:
        """All or nothing; other threads wait."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def attachments(self) -> list[Attachment]:
        with self._lock:
            return [_decode(row[0]) for row in self._db.execute("SELECT record FROM attachments")]

    def get(self, key: Key) -> Attachment | None:
        with self._lock:
            row = self._db.execute(
                "SELECT record FROM attachments"
                " WHERE network = ? AND container = ? AND ifname = ? AND plugin = ?",
                key,
            ).fetchone()
        return _decode(row[0]) if row else None

    def resting(self) -> list[Resting]:
        with self._lock:
            return [Resting(*row) for row in self._db.execute("SELECT * FROM resting")]

    def cursors(self) -> list[Cursor]:
        with self._lock:
            rows = self._db.execute("SELECT pool, set_index, bits, last FROM cursors")
            return [Cursor(p, i, bits, int.from_bytes(last, "big")) for p, i, bits, last in rows]

    def removals(self) -> list[tuple[str, str]]:
        """Links whose removal was begun: ``(wiring, host end)``."""
        with self._lock:
            return list(self._db.execute("SELECT wiring, link FROM removals"))

    def add(self, attachment: Attachment, cursors: Iterable[Cursor], now: float) -> None:
        """Confirm an ADD. `now` is in seconds of the pool's clock."""
        with self.transaction() as db:
            db.execute("DELETE FROM resting WHERE until <= ?", (now,))
            db.executemany(
                "DELETE FROM resting WHERE pool = ? AND address = ?",
                [(attachment.pool, each.address) for each in attachment.addresses],
            )
            db.execute(
                "INSERT OR REPLACE INTO attachments VALUES (?, ?, ?, ?, ?)",
                (*attachment.key, _encode(attachment)),
            )
            db.executemany(
                "INSERT OR REPLACE INTO cursors VALUES (?, ?, ?, ?)",
                [
                    (c.pool, c.set_index, c.bits, c.last.to_bytes(c.bits // 8, "big"))
                    for c in cursors
                ],
            )

    def remove(self, attachment: Attachment, rest_until: float) -> None:
        """Confirm a DEL: the addresses rest, the link is to be removed."""
        with self.transaction() as db:
            self._forget(db, attachment.key)
            if attachment.pool:
                db.executemany(
                    "INSERT OR REPLACE INTO resting VALUES (?, ?, ?)",
                    [(attachment.pool, a.address, rest_until) for a in attachment.addresses],
                )
            if attachment.host_ifname:
                db.execute(
                    "INSERT OR REPLACE INTO removals VALUES (?, ?)",
                    (attachment.wiring, attachment.host_ifname),
                )

    def removed(self, links: Collection[tuple[str, str]]) -> None:
        """These links are gone."""
        with self.transaction() as db:
            db.executemany("DELETE FROM removals WHERE wiring = ? AND link = ?", links)

    def _forget(self, db: sqlite3.Connection, key: Key) -> None:
        db.execute(
            "DELETE FROM attachments WHERE network = ? AND container = ? AND ifname = ?"
            " AND plugin = ?",
            key,
        )

    def _prepare(self, boot: str) -> None:
        version: int = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise ConfigError(
                f"the state file {self._path} is of a newer podwire (format {version}, "
                f"this one knows {FORMAT}); run the newer version"
            )
        with self.transaction() as db:
            if version == 0:
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO boot VALUES (?)", (boot,))
                db.execute(f"PRAGMA user_version={FORMAT}")
            elif db.execute("SELECT id FROM boot").fetchone() != (boot,):
                for table in ("attachments", "resting", "removals"):
                    db.execute(f"DELETE FROM {table}")
                db.execute("UPDATE boot SET id = ?", (boot,))
