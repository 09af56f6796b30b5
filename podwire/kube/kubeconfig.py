"""How to reach a cluster and who we are there: kubeconfig files and the in-cluster account.

Source: kubernetes.io, "Organizing Cluster Access Using kubeconfig Files" and
"client.authentication.k8s.io/v1" (exec plugins).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from podwire.errors import ConfigError
from podwire.kube.objects import Json

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_EXEC_API = "client.authentication.k8s.io/v1"
_EXEC_TIMEOUT_S = 60.0
_TOKEN_AGE_S = 60.0  # a rotated token file is noticed after at most this long


class Credentials(Protocol):
    """Who we are. `header` is asked before every request, `refused` is told of a 401."""

    async def header(self) -> str:
        """The Authorization header, or ``""`` when the TLS certificate says it all."""
        ...

    def refused(self) -> None: ...


@dataclass(slots=True)
class StaticCredentials:
    """A token or password that never changes, or none."""

    value: str = ""

    async def header(self) -> str:
        return self.value

    def refused(self) -> None:
        return


@dataclass(slots=True)
class TokenFile:
    """A token in a file that somebody rotates (the kubelet, for service accounts)."""

    path: Path
    _token: str = ""
    _read_at: float = -_TOKEN_AGE_S

    async def header(self) -> str:
        if time.monotonic() - self._read_at >= _TOKEN_AGE_S:
            try:
                self._token = self.path.read_text().strip()
            except OSError as error:
                if not self._token:
                    raise ConfigError(f"cannot read the token file {self.path}: {error}") from None
            self._read_at = time.monotonic()
        return f"Bearer {self._token}"

    def refused(self) -> None:
        self._read_at = -_TOKEN_AGE_S


@dataclass(slots=True)
class ExecPlugin:
    """A program that prints an ExecCredential; asked again when it expires or is refused.

    A client certificate that it gives goes into `context`.
    """

    command: list[str]
    env: Mapping[str, str]
    api_version: str
    context: ssl.SSLContext | None
    cluster: Json | None = None
    _token: str = ""
    _expires: float = 0.0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def header(self) -> str:
        async with self._lock:
            if time.time() >= self._expires:
                self._accept(await self._run())
        return f"Bearer {self._token}" if self._token else ""

    def refused(self) -> None:
        self._expires = 0.0

    async def _run(self) -> Json:
        spec: Json = {"interactive": False}
        if self.cluster:
            spec["cluster"] = self.cluster
        info = {"apiVersion": self.api_version, "kind": "ExecCredential", "spec": spec}
        env = {**os.environ, **self.env, "KUBERNETES_EXEC_INFO": json.dumps(info)}
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
            )
        except OSError as error:
            raise ConfigError(f"cannot run the exec plugin {self.command[0]}: {error}") from None
        try:
            out, err = await asyncio.wait_for(process.communicate(), _EXEC_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise ConfigError(f"the exec plugin {self.command[0]} did not answer") from None
        if process.returncode:
            message = err.decode(errors="replace").strip()
            raise ConfigError(f"the exec plugin {self.command[0]} failed: {message}")
        try:
            return json.loads(out)
        except ValueError:
            raise ConfigError(f"the exec plugin {self.command[0]} printed no JSON") from None

    def _accept(self, answer: Json) -> None:
        status: Json = answer.get("status") or {}
        self._token = status.get("token", "")
        certificate, key = status.get("clientCertificateData"), status.get("clientKeyData")
        if certificate and key and self.context:
            _load_pair(self.context, certificate.encode(), key.encode())
        if not self._token and not certificate:
            raise ConfigError(f"the exec plugin {self.command[0]} gave no credential")
        self._expires = float("inf")
        if until := status.get("expirationTimestamp"):
            # a little early, so that no request leaves with a token that dies on the way
            self._expires = datetime.fromisoformat(until.replace("Z", "+00:00")).timestamp() - 10


@dataclass(slots=True)
class ClusterConfig:
    """`context` is None for plain HTTP; `server_name` overrides the name in the certificate."""

    server: str
    credentials: Credentials
    context: ssl.SSLContext | None = None
    server_name: str | None = None
    proxy: str | None = None


def load(path: str | Path | None = None, context: str = "") -> ClusterConfig:
    """The cluster that `path`, ``$KUBECONFIG``, the pod's account or ~/.kube/config names.

    Raises ConfigError.
    """
    if path:
        return from_file(Path(path), context)
    if named := os.environ.get("KUBECONFIG"):
        return from_file(Path(named.split(os.pathsep)[0]), context)
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return in_cluster()
    return from_file(Path.home() / ".kube/config", context)


def in_cluster(account: Path = SERVICE_ACCOUNT) -> ClusterConfig:
    """The cluster this pod runs in, by its service account. Raises ConfigError."""
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if not host:
        raise ConfigError("not in a cluster: KUBERNETES_SERVICE_HOST is not set")
    try:
        tls = _trusting(cafile=str(account / "ca.crt"))
    except OSError as error:
        raise ConfigError(f"cannot read {account / 'ca.crt'}: {error}") from None
    server = f"https://[{host}]:{port or 443}" if ":" in host else f"https://{host}:{port or 443}"
    return ClusterConfig(server, TokenFile(account / "token"), tls)


def from_file(path: Path, context: str = "") -> ClusterConfig:
    """One context (the current one) of a kubeconfig file. Raises ConfigError."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the kubeconfig {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the kubeconfig {path} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"the kubeconfig {path} is empty")
    reader = _Reader(path, cast("Json", document))
    return reader.config(context or str(reader.document.get("current-context") or ""))


class _Reader:
    def __init__(self, path: Path, document: Json) -> None:
        self.path = path
        self.document = document

    def _named(self, section: str, name: str) -> Json:
        entries: list[Json] = self.document.get(section) or []
        for entry in entries:
            if entry.get("name") == name:
                return entry.get(section.removesuffix("s")) or {}
        raise ConfigError(f"the kubeconfig {self.path} has no {section[:-1]} {name!r}")

    def _bytes(self, entry: Json, name: str) -> bytes | None:
        """The content of ``NAME-data`` (base64) or of the file that ``NAME`` is the path of."""
        try:
            if data := entry.get(f"{name}-data"):
                return base64.b64decode(data)
            if file := entry.get(name):
                return (self.path.parent / file).read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the kubeconfig {self.path}: {name}: {error}") from None
        return None

    def config(self, context: str) -> ClusterConfig:
        chosen = self._named("contexts", context)
        cluster = self._named("clusters", str(chosen.get("cluster", "")))
        user = self._named("users", str(chosen["user"])) if chosen.get("user") else {}
        server = str(cluster.get("server", "")).rstrip("/")
        if not server:
            raise ConfigError(f"the kubeconfig {self.path} names no server")
        tls = self._tls(cluster, user) if server.startswith("https://") else None
        return ClusterConfig(
            server,
            self._credentials(user, cluster, tls),
            tls,
            cluster.get("tls-server-name"),
            cluster.get("proxy-url"),
        )

    def _tls(self, cluster: Json, user: Json) -> ssl.SSLContext:
        authority = self._bytes(cluster, "certificate-authority")
        try:
            tls = _trusting(cadata=authority.decode() if authority else None)
            if cluster.get("insecure-skip-tls-verify"):
                tls.check_hostname = False
                tls.verify_mode = ssl.CERT_NONE
            certificate = self._bytes(user, "client-certificate")
            key = self._bytes(user, "client-key")
            if certificate and key:
                _load_pair(tls, certificate, key)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the kubeconfig {self.path}: bad certificate: {error}") from None
        return tls

    def _credentials(self, user: Json, cluster: Json, tls: ssl.SSLContext | None) -> Credentials:
        if token := user.get("token"):
            return StaticCredentials(f"Bearer {token}")
        if file := user.get("tokenFile"):
            return TokenFile(self.path.parent / file)
        if plugin := user.get("exec"):
            return self._plugin(plugin, cluster, tls)
        if name := user.get("username"):
            pair = f"{name}:{user.get('password', '')}".encode()
            return StaticCredentials(f"Basic {base64.b64encode(pair).decode()}")
        return StaticCredentials()

    def _plugin(self, plugin: Json, cluster: Json, tls: ssl.SSLContext | None) -> ExecPlugin:
        command = str(plugin.get("command") or "")
        if not command:
            raise ConfigError(f"the kubeconfig {self.path}: exec names no command")
        if "/" in command:
            command = str(self.path.parent / command)
        variables: list[Json] = plugin.get("env") or []
        shared: Json = {}
        if plugin.get("provideClusterInfo"):
            names = ("server", "certificate-authority-data", "tls-server-name")
            shared = {name: cluster[name] for name in names if name in cluster}
        return ExecPlugin(
            command=[command, *map(str, cast("list[Any]", plugin.get("args") or []))],
            env={str(one["name"]): str(one["value"]) for one in variables},
            api_version=str(plugin.get("apiVersion") or _EXEC_API),
            context=tls,
            cluster=shared or None,
        )


def _trusting(cafile: str | None = None, cadata: str | None = None) -> ssl.SSLContext:
    """A client's context that trusts one authority, or the system's."""
    tls = ssl.create_default_context(cafile=cafile, cadata=cadata)
    # On by default since Python 3.13, it refuses authorities without key identifiers, as some
    # managed clusters have; Go's clients, kubectl among them, take those.
    tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return tls


def _load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """OpenSSL takes a certificate and key only from a file: one that lives for a moment."""
    handle, name = tempfile.mkstemp(prefix="podwire-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(certificate + b"\n" + key)
        context.load_cert_chain(name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
