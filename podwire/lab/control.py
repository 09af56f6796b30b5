"""Commands to a lab's supervisor, for those who need not import all that it runs."""

from __future__ import annotations

import json
import socket
from typing import Any, TypeAlias

from podwire.errors import PodwireError
from podwire.lab.state import LabDir

Json: TypeAlias = dict[str, Any]


def command(lab: LabDir, request: Json) -> Json:
    """Ask a lab's supervisor. Raises PodwireError with its answer, or when it is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        try:
            sock.connect(str(lab.supervisor_socket))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile() as stream:
                answer: Json = json.loads(stream.readline() or "{}")
        except OSError as error:
            raise PodwireError(
                f"lab {lab.name} has no supervisor any more ({error.strerror or error}): "
                f"`podwire lab down --name {lab.name}` takes the rest away"
            ) from None
    if "error" in answer:
        raise PodwireError(str(answer["error"]))
    return answer
