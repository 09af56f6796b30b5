import asyncio
import time

from podwire.agent.loop import Loop
from podwire.agent.sync import Sync
from podwire.errors import KernelError
from podwire.kube.objects import Metadata, Node
from podwire.kube.store import ChangeSet, Store


class Path:
    """A part that notes what it is asked, and refuses as often as told."""

    requirements = ()

    def __init__(self, refusals: int = 0) -> None:
        self.calls: list[object] = []
        self.refusals = refusals

    def start(self) -> None: ...

    def cleanup(self) -> None: ...

    def apply(self, table: frozenset[str]) -> None:
        if self.refusals:
            self.refusals -= 1
            raise KernelError("busy", errno=16)
        self.calls.append(sorted(table))

    def flush(self) -> None:
        self.calls.append("flush")

    def verify(self) -> list[str]:
        self.calls.append("verify")
        return []

    def status(self) -> dict[str, object]:
        return {}


class Names:
    def __init__(self) -> None:
        self.table: frozenset[str] = frozenset()

    def update(self, changes: ChangeSet) -> frozenset[str]:
        for (_, name), change in changes.of(Node).items():
            self.table = self.table - {name} if change.new is None else self.table | {name}
        return self.table


def node(name: str) -> Node:
    return Node(metadata=Metadata(name=name))


def make(path: Path, verify_period_s: float = 60) -> tuple[Store, Sync[frozenset[str]], Loop]:
    store = Store()
    sync = Sync("nodes", (Node,), Names().update, path)
    loop = Loop(store, [sync], verify_period_s=verify_period_s,
                before=lambda changes: None, after=lambda changes, began: None)  # fmt: skip
    return store, sync, loop


def test_adds_at_once_deletes_in_one_flush_and_an_unchanged_table_makes_no_call() -> None:
    async def scenario() -> None:
        path = Path()
        store, _, loop = make(path)
        for name in ("a", "b"):
            store.put(node(name))
            loop.wake()
            await loop.step()
        assert path.calls == [["a"], ["a", "b"]]
        task = asyncio.create_task(loop.run())
        while "flush" not in path.calls:
            await asyncio.sleep(0.001)
        task.cancel()
        assert path.calls == [["a"], ["a", "b"], "flush"]
        assert loop.queued_since == 0
        store.put(node("b"))
        await loop.step()
        assert path.calls[-1] == "flush"

    asyncio.run(scenario())


def test_what_the_kernel_refuses_is_retried_and_shown() -> None:
    async def scenario() -> None:
        path = Path(refusals=2)
        store, sync, loop = make(path)
        store.put(node("a"))
        loop.wake()
        await loop.step()
        assert sync.status()["error"] == "busy"
        assert loop.queued_since > 0
        task = asyncio.create_task(loop.run())
        while not path.calls:
            await asyncio.sleep(0.01)
        task.cancel()
        assert path.calls[0] == ["a"]
        assert sync.failures == 2
        assert sync.status()["error"] == ""

    asyncio.run(scenario())


def test_the_integrity_check_runs_in_its_period() -> None:
    async def scenario() -> None:
        path = Path()
        store, _, loop = make(path, verify_period_s=0.02)
        store.put(node("a"))
        loop.wake()
        began = time.monotonic()
        task = asyncio.create_task(loop.run())
        while path.calls.count("verify") < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        assert time.monotonic() - began >= 0.04

    asyncio.run(scenario())
