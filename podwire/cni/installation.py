"""The CNI plugin in the runtime's folder: one static program under several names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from podwire.cni.chained import PARTS
from podwire.errors import ConfigError

BUILT = Path(__file__).resolve().parents[1] / "built" / "podwire-cni"
BIN_DIR = Path("/opt/cni/bin")
PROGRAM = "podwire"
NAMES = tuple(f"{PROGRAM}-{part}" for part in ("ipam", "ptp", "loopback", *PARTS))
"""The names of its parts, for whoever puts them into chains of their own."""


def install(folder: Path = BIN_DIR) -> Path:
    """Put the program and its names in place; a running one is replaced, never written to.

    Raises ConfigError when it was not built, OSError.
    """
    if not BUILT.exists():
        raise ConfigError(f"the CNI plugin is not built ({BUILT}); run make setup")
    folder.mkdir(parents=True, exist_ok=True)
    program, draft = folder / PROGRAM, folder / f".{PROGRAM}.draft"
    shutil.copyfile(BUILT, draft)
    draft.chmod(0o755)
    draft.rename(program)
    for name in NAMES:
        link = folder / f".{name}.draft"
        link.unlink(missing_ok=True)
        link.symlink_to(PROGRAM)
        link.rename(folder / name)
    return program


def uninstall(folder: Path = BIN_DIR) -> list[Path]:
    """Take away what `install` put in place, and nothing of others. Returns what was removed."""
    removed: list[Path] = []
    for name in (*NAMES, PROGRAM):
        path = folder / name
        ours = path.is_file() if name == PROGRAM else path.is_symlink() and _leads_here(path)
        if ours:
            path.unlink()
            removed.append(path)
    return removed


def _leads_here(link: Path) -> bool:
    return os.readlink(link) == PROGRAM
