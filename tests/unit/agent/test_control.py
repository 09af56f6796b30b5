import asyncio
import stat
from pathlib import Path

import pytest

from podwire.agent.control import ControlServer, _ask, follow
from podwire.errors import ApiError, InvalidObject


def test_handlers_answer_over_a_socket_of_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"

    async def scenario() -> None:
        server = ControlServer(path)
        server.route("/v1/echo", lambda query: {"got": dict(query)})

        async def late(query: object) -> object:
            await asyncio.sleep(0)
            raise InvalidObject("no such pod", object="Pod x/a")

        async def three(query: object):
            for number in range(3):
                yield {"n": number}

        server.route("/v1/late", late)
        server.stream("/v1/three", three)
        await server.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await _ask(path, "/v1/echo", {"a": "1"}, None) == {"got": {"a": "1"}}
        assert await _ask(path, "/v1/echo", {}, "text") == {"got": {"body": "text"}}
        with pytest.raises(ApiError, match="Pod x/a: no such pod"):
            await _ask(path, "/v1/late", {}, None)
        with pytest.raises(ApiError, match="nothing answers /v1/none here"):
            await _ask(path, "/v1/none", {}, None)
        assert [item async for item in follow(path, "/v1/three", {})] == [
            {"n": 0},
            {"n": 1},
            {"n": 2},
        ]
        await server.stop()

    asyncio.run(scenario())
    assert not path.exists()


def test_no_agent_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="no agent answers at"):
        asyncio.run(_ask(tmp_path / "agent.sock", "/v1/status", {}, None))
