"""A Kubernetes API client: typed reads, JSON writes, watches that decode from the stream."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import aiohttp
import msgspec

from podwire.errors import ApiError
from podwire.kube.kubeconfig import ClusterConfig
from podwire.kube.objects import Json, Resource
from podwire.kube.resources import ENDPOINTS
from podwire.kube.store import Key

R = TypeVar("R", bound=Resource)

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 60.0
_WATCH_SLACK_S = 15.0
# a peer that vanished without a word is noticed after 15 + 3 × 5 seconds
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 15),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
)


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct, Generic[R]):
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)
    items: list[R] | None = None


class _RawList(msgspec.Struct):
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct, Generic[R]):
    type: str
    object: R


class _Name(msgspec.Struct):
    name: str = ""
    namespace: str = ""


class _Named(msgspec.Struct):
    metadata: _Name = msgspec.field(default_factory=_Name)


class _Status(msgspec.Struct):
    message: str = ""
    reason: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True)
class Listing(Generic[R]):
    """A list: `refused` names the objects that did not decode, and why."""

    objects: list[R]
    version: str
    refused: Mapping[Key, str] = field(default_factory=dict[Key, str])


class WatchEvent(NamedTuple, Generic[R]):
    """`type` is ADDED, MODIFIED, DELETED or BOOKMARK; `object` is None when it did not decode."""

    type: str
    key: Key
    object: R | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Selection(Generic[R]):
    """Which objects of a kind are wanted."""

    kind: type[R]
    namespace: str = ""
    label_selector: str = ""
    field_selector: str = ""

    def query(self) -> dict[str, str]:
        wanted = {"labelSelector": self.label_selector, "fieldSelector": self.field_selector}
        return {name: value for name, value in wanted.items() if value}


class Client:
    """Use as ``async with Client(config) as client``. Every method raises ApiError; status 0 means
    that there was no answer.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._session: aiohttp.ClientSession | None = None
        self._codecs: dict[type[Resource], _Codec[Any]] = {}
        self._watches: set[aiohttp.ClientResponse] = set()

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def reconnect(self) -> None:
        """Give up all connections: what is under way fails as without an answer.

        For when an address of this machine is gone, and with it, without a word, whatever was
        connected from there.
        """
        old = self._session
        await self.__aenter__()
        for response in self._watches:  # closing a session leaves its readers waiting
            response.content.set_exception(aiohttp.ClientConnectionError("connection given up"))
        if old:
            await old.close()

    # --- requests --------------------------------------------------------------------------------

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """The answer's body. A refused credential is renewed once and tried again."""
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": content_type}
        response = await self._send(method, path, query, data, headers)
        try:
            return await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _no_answer(method, path, error) from error
        finally:
            response.release()

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float = _ANSWER_TIMEOUT_S,
    ) -> aiohttp.ClientResponse:
        """An open response with a good status."""
        assert self._session, "use the client inside `async with`"
        config = self._config
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=silence_s
        )
        retried = False
        while True:
            authorization = await config.credentials.header()
            try:
                response = await self._session.request(
                    method,
                    config.server + path,
                    params=query,
                    data=data,
                    headers={
                        "Accept": "application/json",
                        **({"Authorization": authorization} if authorization else {}),
                        **(headers or {}),
                    },
                    ssl=config.context if config.context is not None else True,
                    server_hostname=config.server_name,
                    proxy=config.proxy,
                    timeout=timeout,
                )
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _no_answer(method, path, error) from error
            if response.status < 400:
                return response
            body = await response.read()
            response.release()
            if response.status != 401 or retried:
                raise _refusal(method, path, response.status, body)
            config.credentials.refused()
            retried = True

    def _codec(self, kind: type[R]) -> _Codec[R]:
        codec = self._codecs.get(kind)
        if codec is None:
            codec = self._codecs[kind] = _Codec(kind)
        return codec

    # --- reading ---------------------------------------------------------------------------------

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        body = await self.request("GET", ENDPOINTS[kind].path(namespace, name))
        return self._codec(kind).one(body)

    async def list(
        self, selection: Selection[R], *, page: int = 2000, version: str = ""
    ) -> Listing[R]:
        """All objects, page by page, as of one moment. Status 410 when the pages grew too old.

        `version` ``"0"`` lets the server answer from its cache.
        """
        path = ENDPOINTS[selection.kind].path(selection.namespace)
        codec = self._codec(selection.kind)
        query = selection.query()
        if page:
            query["limit"] = str(page)
        if version:
            query["resourceVersion"] = version
        objects: list[R] = []
        refused: dict[Key, str] = {}
        while True:
            body = await self.request("GET", path, query=query)
            metadata, items = codec.page(body, refused)
            objects += items
            if not metadata.continue_:
                return Listing(objects, metadata.resource_version, refused)
            query.pop("resourceVersion", None)
            query["continue"] = metadata.continue_

    async def watch(
        self, selection: Selection[R], version: str, timeout_s: float = 300.0
    ) -> AsyncIterator[list[WatchEvent[R]]]:
        """Events after `version`, in batches as they arrive; ends when the server closes.

        Raises ApiError also for an ERROR event: 410 means list again.
        """
        query = {
            **selection.query(),
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(int(timeout_s)),
        }
        path = ENDPOINTS[selection.kind].path(selection.namespace)
        codec = self._codec(selection.kind)
        response = await self._send("GET", path, query, silence_s=timeout_s + _WATCH_SLACK_S)
        self._watches.add(response)
        try:
            _keep_alive(response)
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                if lines:
                    yield [codec.event(line) for line in lines if line]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _no_answer("GET", path, error) from error
        finally:
            self._watches.discard(response)
            response.close()

    # --- writing: JSON, because the typed objects hold only the fields that we read --------------

    async def create(self, kind: type[R], obj: Json, namespace: str = "") -> R:
        body = await self.request("POST", ENDPOINTS[kind].path(namespace), obj)
        return self._codec(kind).one(body)

    async def update(self, kind: type[R], obj: Json, *, subresource: str = "") -> R:
        """Replace an object; 409 when its resourceVersion is no longer the stored one."""
        metadata = obj["metadata"]
        path = ENDPOINTS[kind].path(metadata.get("namespace", ""), metadata["name"], subresource)
        return self._codec(kind).one(await self.request("PUT", path, obj))

    async def patch(
        self,
        kind: type[R],
        name: str,
        patch: Json | list[Json],
        namespace: str = "",
        *,
        style: str = MERGE_PATCH,
        subresource: str = "",
        manager: str = "podwire",
    ) -> R:
        """`style` is one of JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY_PATCH."""
        query = {"fieldManager": manager}
        if style == APPLY_PATCH:
            query["force"] = "true"
        path = ENDPOINTS[kind].path(namespace, name, subresource)
        body = await self.request("PATCH", path, patch, query=query, content_type=style)
        return self._codec(kind).one(body)

    async def delete(
        self,
        kind: type[R],
        name: str,
        namespace: str = "",
        *,
        grace_period_s: int | None = None,
        uid: str = "",
    ) -> None:
        """Ask for deletion; with `uid` only of that very object (409 otherwise)."""
        options: Json = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if grace_period_s is not None:
            options["gracePeriodSeconds"] = grace_period_s
        if uid:
            options["preconditions"] = {"uid": uid}
        await self.request("DELETE", ENDPOINTS[kind].path(namespace, name), options)


class _Codec(Generic[R]):
    """Decoders of one kind, made once."""

    def __init__(self, kind: type[R]) -> None:
        self._one = msgspec.json.Decoder(kind)
        self._list = msgspec.json.Decoder(_List[kind])
        self._event = msgspec.json.Decoder(_Event[kind])

    def one(self, body: bytes) -> R:
        try:
            return self._one.decode(body)
        except msgspec.DecodeError as error:
            raise ApiError(f"the API's answer does not decode: {error}") from None

    def page(self, body: bytes, refused: dict[Key, str]) -> tuple[_ListMeta, list[R]]:
        """A list page. Only when something in it is bad are its items decoded one by one."""
        try:
            page = self._list.decode(body)
            return page.metadata, page.items or []
        except msgspec.ValidationError:
            pass
        except msgspec.DecodeError as error:
            raise ApiError(f"the API's answer does not decode: {error}") from None
        raw = msgspec.json.decode(body, type=_RawList)
        good: list[R] = []
        for item in raw.items or ():
            try:
                good.append(self._one.decode(item))
            except msgspec.ValidationError as error:
                refused[_key(item)] = str(error)
        return raw.metadata, good

    def event(self, line: bytes) -> WatchEvent[R]:
        try:
            event = self._event.decode(line)
        except msgspec.ValidationError as error:
            return self._bad_event(line, str(error))
        except msgspec.DecodeError as error:
            raise ApiError(f"the watch stream does not decode: {error}") from None
        if event.type == "ERROR":
            raise _stream_error(line)
        return WatchEvent(event.type, event.object.key, event.object)

    def _bad_event(self, line: bytes, reason: str) -> WatchEvent[R]:
        raw = msgspec.json.decode(line, type=_Event[msgspec.Raw])  # pyright: ignore
        if raw.type == "ERROR":
            raise _stream_error(line)
        return WatchEvent(raw.type, _key(raw.object), None, reason)


def _key(raw: msgspec.Raw) -> Key:
    try:
        named = msgspec.json.decode(raw, type=_Named).metadata
    except msgspec.ValidationError:
        return ("", "?")
    return (named.namespace, named.name)


def _stream_error(line: bytes) -> ApiError:
    class _ErrorEvent(msgspec.Struct):
        object: _Status

    try:
        status = msgspec.json.decode(line, type=_ErrorEvent).object
    except msgspec.DecodeError:
        return ApiError("the watch ended with an error that does not decode", status=500)
    return ApiError(status.message, status=status.code, reason=status.reason)


def _no_answer(method: str, path: str, error: BaseException) -> ApiError:
    what = str(error) or type(error).__name__
    return ApiError(f"{method} {path}: no answer from the API: {what}")


def _refusal(method: str, path: str, status: int, body: bytes) -> ApiError:
    try:
        answer = msgspec.json.decode(body, type=_Status)
    except msgspec.DecodeError:
        answer = _Status(message=body[:200].decode(errors="replace"))
    message = answer.message or f"HTTP status {status}"
    return ApiError(f"{method} {path}: {message}", status=status, reason=answer.reason)


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    transport = response.connection.transport if response.connection else None
    sock = transport.get_extra_info("socket") if transport else None
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
