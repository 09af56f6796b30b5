"""The cloud's two doors: EC2's Query API and the metadata service, over HTTP."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from podwire.lab.cloud import query
from podwire.lab.cloud.faults import AnswerLost, Ec2Error, Faults
from podwire.lab.cloud.metadata import MAX_TOKEN_TTL_S, Metadata, Tokens
from podwire.lab.cloud.model import Model
from podwire.lab.cloud.operations import Answer, Operations, Parameters

TOKEN_HEADER = "X-aws-ec2-metadata-token"
TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"


@dataclass(frozen=True)
class Call:
    """One request that reached EC2. `error` is empty when it was answered."""

    at: float
    operation: str
    error: str = ""


class Cloud:
    """Model, operations, faults and metadata in one; the doors and the tests stand before it."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model or Model()
        self.operations = Operations(self.model)
        self.faults = Faults(self.model.clock)
        self.calls: list[Call] = []
        self._metadata: dict[str, Metadata] = {}

    async def invoke(self, operation: str, parameters: Parameters) -> Answer:
        """One request as EC2 would treat it. Raises Ec2Error or AnswerLost.

        Half of the delay is before the deed, half before the answer: by then it may be out of date.
        """
        outcome = self.faults.outcome(operation)
        await asyncio.sleep(outcome.delay_s / 2)
        try:
            if outcome.error is not None:
                raise outcome.error
            answer = self.operations.call(operation, parameters)
        except Ec2Error as error:
            self.calls.append(Call(self.model.clock(), operation, error.code))
            await asyncio.sleep(outcome.delay_s / 2)
            raise
        self.calls.append(Call(self.model.clock(), operation))
        await asyncio.sleep(outcome.delay_s / 2)
        if outcome.lose_answer:
            raise AnswerLost(f"{operation}: the connection broke")
        return answer

    def metadata(self, instance_id: str) -> Metadata:
        """What the instance's metadata service says; the same object every time."""
        if instance_id not in self._metadata:
            self._metadata[instance_id] = Metadata(self.model, instance_id)
        return self._metadata[instance_id]


def ec2_app(cloud: Cloud) -> web.Application:
    """EC2's endpoint. Signatures must be there (version 4); which keys made them is all one."""

    async def handle(request: web.Request) -> web.Response:
        request_id = str(uuid.uuid4())
        try:
            if not request.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 "):
                raise Ec2Error("AuthFailure", "AWS was not able to validate the credentials")
            form = {key: str(value) for key, value in (await request.post()).items()}
            operation, parameters = query.decode(form)
            answer = await cloud.invoke(operation, parameters)
        except Ec2Error as error:
            return _xml(query.encode_error(error, request_id), error.status)
        except AnswerLost:
            assert request.transport is not None
            request.transport.abort()
            raise
        return _xml(query.encode(operation, answer, request_id), 200)

    app = web.Application()
    app.router.add_post("/", handle)
    return app


def _xml(text: str, status: int) -> web.Response:
    return web.Response(text=text, status=status, content_type="text/xml")


def imds_app(cloud: Cloud, instance_of: Callable[[web.Request], str | None]) -> web.Application:
    """The metadata service. `instance_of` says which instance asks, by its address say.

    Only version 2: a request without a token, or with one that has run out, gets 401.
    """
    tokens = Tokens(cloud.model.clock)

    async def put_token(request: web.Request) -> web.Response:
        text = request.headers.get(TTL_HEADER, "")
        if not text.isdigit() or not 1 <= int(text) <= MAX_TOKEN_TTL_S:
            return web.Response(status=400)
        if "X-Forwarded-For" in request.headers:  # a proxy must not fetch tokens for others
            return web.Response(status=403)
        return web.Response(text=tokens.make(int(text)), headers={TTL_HEADER: text})

    async def get(request: web.Request) -> web.Response:
        if not tokens.good(request.headers.get(TOKEN_HEADER, "")):
            return web.Response(status=401)
        instance = instance_of(request)
        text = cloud.metadata(instance).get(request.match_info["path"]) if instance else None
        return web.Response(status=404) if text is None else web.Response(text=text)

    app = web.Application()
    app.router.add_put("/latest/api/token", put_token)
    app.router.add_get("/latest/{path:.*}", get)
    return app


async def serve(app: web.Application, site: Callable[[web.AppRunner], web.BaseSite]) -> Close:
    """Start `app` on the site that `site` makes; call what comes back to stop it."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await site(runner).start()
    return runner.cleanup


Close = Callable[[], Awaitable[None]]
