"""An agent that cannot start leaves nothing of eBPF behind, and leaves alone what serves."""

import os
import socket
import subprocess
import sys

import pytest

from podwire.datapath.ebpf import pinned, programs
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel import netns

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(programs.missing()), reason="no eBPF data path here"),
]
KUBECONFIG = """
{"clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
 "contexts": [{"name": "c", "context": {"cluster": "c"}}], "current-context": "c"}
"""


@pytest.mark.parametrize("serving", [False, True])
def test_an_agent_that_does_not_get_its_port_leaves_nothing(
    netns_fd, run_prefix, tmp_path, serving
):
    earlier = Programs(run_prefix, netns_fd)
    if serving:
        earlier.enable("services")
    links = pinned.link_paths(run_prefix)
    (tmp_path / "kubeconfig").write_text(KUBECONFIG)
    with netns.entered(netns_fd):
        taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    command = [
        sys.executable, "-m", "podwire", "agent", "--datapath=ebpf", "--only=services",
        f"--node-name={run_prefix}", f"--kubeconfig={tmp_path}/kubeconfig", f"--run-dir={tmp_path}",
        f"--state-dir={tmp_path}", f"--healthz-bind-address={address}",
    ]  # fmt: skip
    try:
        with taken, netns.entered(netns_fd):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "address already in use" in done.stderr
        assert set(links) <= set(pinned.link_paths(run_prefix))
        assert pinned.folder(run_prefix).exists() is serving
    finally:
        earlier.cleanup()
