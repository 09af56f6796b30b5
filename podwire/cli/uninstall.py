"""`podwire uninstall`: take the CNI configuration and plugin away again."""

from __future__ import annotations

import argparse

from podwire.cli.install import add_folders
from podwire.cni import conflist, installation


def configure(parser: argparse.ArgumentParser) -> None:
    add_folders(parser)


def run(args: argparse.Namespace) -> int:
    conflist.remove_conflist(args.cni_conf_dir)  # first, so that nothing new is asked of us
    for path in installation.uninstall(args.cni_bin_dir):
        print(f"removed {path}")
    return 0
