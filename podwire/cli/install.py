"""`podwire install`: the CNI plugin, and the configuration once the agent can serve pods."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from podwire.cni import conflist, installation, server


def configure(parser: argparse.ArgumentParser) -> None:
    add_folders(parser)
    default = Path("/run/podwire")
    parser.add_argument("--run-dir", type=Path, default=default, help=f"the agent's ({default})")


def add_folders(parser: argparse.ArgumentParser) -> None:
    """The runtime's two folders."""
    parser.add_argument(
        "--cni-bin-dir", type=Path, default=installation.BIN_DIR, help="default %(default)s"
    )
    parser.add_argument(
        "--cni-conf-dir", type=Path, default=conflist.FOLDER, help="default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    program = installation.install(args.cni_bin_dir)
    print(f"installed {program}")
    if _serves(program, args.run_dir / server.SOCKET):
        print(f"installed {conflist.write_conflist(args.cni_conf_dir)}")
    else:
        # A configuration makes the node Ready, so it is written when pods can be served.
        print(
            f"the agent writes {args.cni_conf_dir / conflist.NAME} when it is ready to serve pods"
        )
    return 0


def _serves(program: Path, socket: Path) -> bool:
    """Whether an agent answers STATUS, asked as a runtime asks."""
    environment = {
        **os.environ,
        "CNI_COMMAND": "STATUS",
        "CNI_PATH": str(program.parent),
        "PODWIRE_CNI_SOCKET": str(socket),
    }
    question = b'{"cniVersion":"1.1.0","name":"podwire","type":"podwire"}'
    done = subprocess.run(
        [program], input=question, env=environment, capture_output=True, timeout=30, check=False
    )
    return done.returncode == 0
