"""The way into the lab's API for the command line: one kept-alive connection, blocking.

The agent's client (`podwire.kube.client`) is asynchronous and watches; a command that asks three
questions is done before that one's HTTP library is imported.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from podwire.errors import ApiError, ConfigError

TIMEOUT_S = 30.0


class Access:
    """Requests with what a kubeconfig of the lab holds. Raises ConfigError if it is unreadable."""

    def __init__(self, kubeconfig: Path) -> None:
        try:
            config: Any = yaml.safe_load(kubeconfig.read_text())
            cluster: dict[str, str] = config["clusters"][0]["cluster"]
            token: str = config["users"][0]["user"]["token"]
        except (OSError, KeyError, yaml.YAMLError) as error:
            raise ConfigError(f"{kubeconfig}: cannot be used: {error}") from None
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        where = urlsplit(cluster["server"])
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        self._connection = http.client.HTTPSConnection(
            where.hostname or "",
            where.port,
            timeout=TIMEOUT_S,
            context=ssl.create_default_context(cadata=authority),
        )

    def request(self, method: str, path: str, body: object = None, content_type: str = "") -> Any:
        """The decoded answer. Raises ApiError with the server's sentence."""
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = json.dumps(body)
            headers["Content-Type"] = content_type or "application/json"
        try:
            try:
                response, answer = self._exchange(method, path, data, headers)
            except (http.client.RemoteDisconnected, ConnectionError):
                # the server may close a connection that was idle; a new one tells more
                self._connection.close()
                response, answer = self._exchange(method, path, data, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ApiError(f"the lab's API server does not answer: {error}") from None
        decoded: Any = msgspec.json.decode(answer) if answer else None
        if response.status >= 400:
            raise ApiError(str(decoded.get("message", "")), status=response.status)
        return decoded

    def _exchange(
        self, method: str, path: str, data: str | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        return response, response.read()
