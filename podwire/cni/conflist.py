"""The network configuration list that makes a runtime use podwire, and a node Ready."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from podwire.cni.protocol import NEWEST

FOLDER = Path("/etc/cni/net.d")
NAME = "10-podwire.conflist"
NETWORK = "podwire"
CAPABILITIES = ("bandwidth", "ips", "mac", "portMappings")


def content(version: str = NEWEST) -> bytes:
    """The list: one plugin that does the work of a chain and asks the runtime for what it can."""
    plugin = {"type": "podwire", "capabilities": dict.fromkeys(CAPABILITIES, True)}
    document = {
        "cniVersion": version,
        # For runtimes that know other versions: they choose the newest both have.
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": NETWORK,
        "plugins": [plugin],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def write_conflist(folder: Path = FOLDER, version: str = NEWEST) -> Path:
    """Put the list in place, whole or not at all; an equal one is left alone. Raises OSError."""
    path, wanted = folder / NAME, content(version)
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == wanted:
            return path
    folder.mkdir(parents=True, exist_ok=True)
    # Runtimes read every file that ends in .conf, .conflist or .json.
    draft = folder / f".{NAME}.draft"
    with open(draft, "wb") as file:
        file.write(wanted)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    return path


def remove_conflist(folder: Path = FOLDER) -> None:
    """Take it away; absent is fine."""
    (folder / NAME).unlink(missing_ok=True)
