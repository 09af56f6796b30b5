"""Our client against the lab's real API server, over TLS on loopback."""

import asyncio
import json
import socket
import ssl
import sys
from contextlib import asynccontextmanager

import pytest

from podwire.errors import ApiError, ConfigError
from podwire.kube import kubeconfig, snapshot
from podwire.kube.client import APPLY_PATCH, Client, Selection
from podwire.kube.kubeconfig import ClusterConfig, StaticCredentials
from podwire.kube.objects import ClusterNetworkPolicy, Namespace, Pod, Resource, Service
from podwire.kube.reflector import Reflector
from podwire.kube.resources import ENDPOINTS, Endpoint
from podwire.kube.store import Store
from podwire.lab.api.server import ApiConfig, ApiServer


def service(name: str, port: int = 80) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"ports": [{"port": port}]},
    }


@asynccontextmanager
async def api(**settings):
    server = ApiServer(ApiConfig(**settings))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def config(server: ApiServer, tmp_path) -> ClusterConfig:
    path = tmp_path / "kubeconfig"
    path.write_text(server.kubeconfig())
    return kubeconfig.load(path)


@asynccontextmanager
async def following(client: Client, *kinds, **settings):
    reflector = Reflector(client, kinds, Store(), **settings)
    task = asyncio.create_task(reflector.run())
    try:
        await reflector.wait_synced(10)
        yield reflector
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(reflector: Reflector, condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            reflector.changed.clear()
            await reflector.changed.wait()


async def settle(condition) -> None:
    """For conditions that nobody signals."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def run(play) -> None:
    asyncio.run(asyncio.wait_for(play, 30))


def test_writes_and_reads(tmp_path):
    async def play():
        async with api() as server, Client(config(server, tmp_path)) as client:
            made = await client.create(Service, service("a"), "default")
            assert made.spec.cluster_ip.startswith("10.96.")
            patched = await client.patch(
                Service, "a", {"spec": {"sessionAffinity": "ClientIP"}}, "default"
            )
            assert patched.spec.session_affinity_config.client_ip.timeout_seconds == 10800
            applied = await client.patch(
                Service, "b", service("b"), "default", style=APPLY_PATCH, manager="me"
            )
            assert applied.metadata.name == "b"
            with pytest.raises(ApiError, match="already exists") as refused:
                await client.create(Service, service("a"), "default")
            assert (refused.value.status, refused.value.reason) == (409, "AlreadyExists")
            await client.delete(Service, "a", "default")
            with pytest.raises(ApiError) as missing:
                await client.get(Service, "a", "default")
            assert missing.value.status == 404

    run(play())


def test_the_pages_of_a_list_show_one_moment(tmp_path):
    async def play():
        async with api() as server, Client(config(server, tmp_path)) as client:
            server.load(service(f"s{i:03}") for i in range(100))
            listing = await client.list(Selection(Service), page=7)
            assert len(listing.objects) == 101  # and `kubernetes`
            assert listing.version == str(server.registry.storage.version)
            with pytest.raises(ApiError) as old:
                await client.request(
                    "GET", "/api/v1/services", query={"limit": "7", "continue": "999-7"}
                )
            assert old.value.status == 410

    run(play())


def test_the_store_follows_the_api(tmp_path):
    async def play():
        async with (
            api() as server,
            Client(config(server, tmp_path)) as client,
            following(client, Service, Namespace) as reflector,
        ):
            store = reflector.store
            assert store.get(Service, ("default", "kubernetes"))
            store.take()
            await client.create(Service, service("a"), "default")
            await until(reflector, lambda: store.get(Service, ("default", "a")))
            await client.delete(Service, "a", "default")
            await until(reflector, lambda: not store.get(Service, ("default", "a")))
            assert not store.take(), "came and went between two looks"

    run(play())


def test_a_forgotten_version_means_list_again(tmp_path):
    async def play():
        async with (
            api(event_log_length=4) as server,
            Client(config(server, tmp_path)) as client,
        ):
            server.load(service(f"s{i}") for i in range(10))
            with pytest.raises(ApiError) as old:
                await anext(client.watch(Selection(Service), "2"))
            assert old.value.status == 410
            async with following(client, Service) as reflector:
                store, state = reflector.store, reflector.states[Service]
                await _cut_off(server, client)
                server.load(service(f"t{i}") for i in range(10))
                await until(reflector, lambda: store.get(Service, ("default", "t9")))
                assert state.lists == 2
                assert state.error == ""

    run(play())


async def _cut_off(server: ApiServer, client: Client) -> None:
    """Drop every connection: the next requests open new ones, too late for the event log."""
    collection = server.registry.storage.collection(server.registry.resource("Service"))
    for connection in list(server.connections):
        connection.transport.abort()
    await settle(lambda: not collection.watchers)


def test_a_dropped_connection_is_taken_up_again_without_a_list(tmp_path):
    async def play():
        async with (
            api() as server,
            Client(config(server, tmp_path)) as client,
            following(client, Service) as reflector,
        ):
            store = reflector.store
            await _cut_off(server, client)
            server.load([service("late")])
            await until(reflector, lambda: store.get(Service, ("default", "late")))
            assert reflector.states[Service].lists == 1

    run(play())


def test_the_api_goes_away_and_comes_back_without_memory(tmp_path):
    async def play():
        sock = socket.create_server(("127.0.0.1", 0))
        address = sock.getsockname()
        first = ApiServer()
        await first.start([sock])
        first.load(service(f"s{i}") for i in range(50))
        settings = config(first, tmp_path)
        async with Client(settings) as client, following(client, Service) as reflector:
            await first.stop()
            await settle(lambda: reflector.states[Service].error)
            assert reflector.synced[Service], "what is known stays"
            assert len(reflector.store.all(Service)) == 51
            second = ApiServer(ApiConfig(token=first.config.token))
            second.certificates = first.certificates
            await second.start([socket.create_server(address)])
            try:
                await until(reflector, lambda: len(reflector.store.all(Service)) == 1)
            finally:
                await second.stop()

    run(play())


def test_an_object_that_does_not_decode_hurts_no_other(tmp_path):
    async def play():
        async with api() as server, Client(config(server, tmp_path)) as client:
            bad = service("bad")
            bad["spec"]["ports"] = [{"port": "eighty"}]
            server.load([bad])
            async with following(client, Service) as reflector:
                store, key = reflector.store, (Service, ("default", "bad"))
                assert "port" in store.set_aside[key]
                assert store.get(Service, ("default", "kubernetes"))
                worse = service("worse")
                worse["spec"] = {"type": 7}
                server.load([worse, service("bad"), service("last")])
                await until(reflector, lambda: store.get(Service, ("default", "last")))
                assert store.get(Service, ("default", "bad"))
                assert list(store.set_aside) == [(Service, ("default", "worse"))]

    run(play())


def test_a_kind_that_the_cluster_does_not_serve_is_an_empty_one(tmp_path, monkeypatch):
    class Unknown(Resource, frozen=True, kw_only=True):
        pass

    monkeypatch.setitem(ENDPOINTS, Unknown, Endpoint("/apis/nobody.example/v1", "unknowns"))

    async def play():
        async with (
            api() as server,
            Client(config(server, tmp_path)) as client,
            following(client, Unknown, ClusterNetworkPolicy) as reflector,
        ):
            assert not reflector.states[Unknown].served
            assert reflector.states[ClusterNetworkPolicy].served

    run(play())


def test_selectors_bring_objects_in_and_out_of_view(tmp_path):
    def pod(node: str) -> dict:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p", "namespace": "default"},
            "spec": {"nodeName": node, "containers": [{"name": "c"}]},
        }

    async def play():
        async with api() as server, Client(config(server, tmp_path)) as client:
            mine = Selection(Pod, field_selector="spec.nodeName=mine")
            async with following(client, mine) as reflector:
                store = reflector.store
                server.load([pod("other")])
                server.load([pod("mine")])
                await until(reflector, lambda: store.all(Pod))
                server.load([pod("other")])
                await until(reflector, lambda: not store.all(Pod))

    run(play())


def test_nobody_enters_without_the_token(tmp_path):
    async def play():
        async with api() as server:
            settings = config(server, tmp_path)
            for wrong in ("", "Bearer nonsense", f"Basic {server.config.token}"):
                settings.credentials = StaticCredentials(wrong)
                async with Client(settings) as client:
                    for path in ("/api", "/healthz", "/version", "/openapi/v2", "/nowhere"):
                        with pytest.raises(ApiError) as refused:
                            await client.request("GET", path)
                        assert refused.value.status == 401
            settings.context = ssl.create_default_context()
            async with Client(settings) as client:
                with pytest.raises(ApiError, match="certificate") as refused:
                    await client.request("GET", "/api")
                assert refused.value.status == 0

    run(play())


def test_a_rotated_service_account_token_is_picked_up(tmp_path, monkeypatch):
    async def play():
        async with api() as server:
            (tmp_path / "ca.crt").write_bytes(server.certificates.authority)
            token = tmp_path / "token"
            token.write_text("first\n")
            server.tokens.add("first")
            host, port = server.url.removeprefix("https://").split(":")
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
            async with Client(kubeconfig.in_cluster(tmp_path)) as client:
                await client.request("GET", "/api")
                token.write_text("second\n")
                server.tokens.add("second")
                server.tokens.remove("first")  # refused once, then read again
                await client.request("GET", "/api")

    run(play())


def test_exec_plugin(tmp_path):
    """Asked once while its credential lives, again when that is refused."""

    async def play():
        async with api() as server:
            plugin, calls = tmp_path / "plugin.py", tmp_path / "calls"
            plugin.write_text(
                "import json, os, sys\n"
                f"calls = open({str(calls)!r}, 'a+')\n"
                "info = json.loads(os.environ['KUBERNETES_EXEC_INFO'])\n"
                "assert info['spec']['cluster']['server'].startswith('https://')\n"
                "calls.write('x'); calls.seek(0)\n"
                "token = os.environ['PREFIX'] + str(len(calls.read()))\n"
                "print(json.dumps({'apiVersion': info['apiVersion'], 'kind': 'ExecCredential',"
                " 'status': {'token': token, 'expirationTimestamp': '2999-01-01T00:00:00Z'}}))\n"
            )
            path = tmp_path / "kubeconfig"
            document = json.loads(server.kubeconfig())
            document["users"][0]["user"] = {
                "exec": {
                    "apiVersion": "client.authentication.k8s.io/v1",
                    "command": sys.executable,
                    "args": [str(plugin)],
                    "env": [{"name": "PREFIX", "value": "t"}],
                    "provideClusterInfo": True,
                }
            }
            path.write_text(json.dumps(document))
            server.tokens.update({"t1", "t2"})
            async with Client(kubeconfig.load(path)) as client:
                await client.request("GET", "/api")
                await client.request("GET", "/api")
                assert calls.read_text() == "x"
                server.tokens.remove("t1")
                await client.request("GET", "/api")
                assert calls.read_text() == "xx"
            document["users"][0]["user"]["exec"]["command"] = "/nonexistent"
            path.write_text(json.dumps(document))
            async with Client(kubeconfig.load(path)) as client:
                with pytest.raises(ConfigError, match="nonexistent"):
                    await client.request("GET", "/api")

    run(play())


def test_the_snapshot_is_what_was_last_known(tmp_path):
    async def play():
        async with (
            api() as server,
            Client(config(server, tmp_path)) as client,
            following(client, Service) as reflector,
        ):
            snapshot.write(snapshot.encode(reflector.store, [Service]), tmp_path / "known.json")
            loaded = Store()
            assert snapshot.load(loaded, [Service, Namespace], tmp_path / "known.json")
            assert dict(loaded.all(Service)) == dict(reflector.store.all(Service))

    run(play())
    assert not snapshot.load(Store(), [Service], tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"Service": [{"meta')
    assert not snapshot.load(Store(), [Service], tmp_path / "torn.json")
