"""The gateway as HTTP: routes, and refusals that name the field."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rgalign_ray import __version__
from rgalign_ray.serve import api
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.session_reader import SessionError

Healthy = Callable[[], Awaitable[bool]]
REFUSED: dict[int | str, dict[str, Any]] = {422: {"model": list[api.Refusal], "description": "A field is wrong."}}


class BodyLimit:
    """Refuses bodies above a size (413), also those that do not tell theirs."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if len(body) > self.limit:
                told = [{"field": "", "message": f"the body is larger than {self.limit:,} bytes"}]
                await JSONResponse(told, status_code=413)(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def build(gateway: Gateway, ready: Healthy) -> FastAPI:
    """The application; `ready` says whether all models answer."""
    app = FastAPI(
        title="rgalign_ray",
        version=__version__,
        description="Ranks the intents of a user who has typed nothing yet.",
        docs_url=None,  # a page that loads another site's scripts; /openapi.json is the document
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, limit=gateway.settings.max_body_bytes)

    @app.exception_handler(SessionError)
    async def _(_: Request, error: SessionError) -> JSONResponse:
        return _refused([api.Refusal(field=error.field, message=error.message)])

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refused(
            [
                api.Refusal(field=".".join(map(str, fault["loc"][1:])), message=str(fault["msg"]))
                for fault in error.errors()
            ]
        )

    @app.post("/v1/rank", responses=REFUSED)
    async def rank(request: api.RankRequest) -> api.RankResponse:
        """The intents for one session."""
        return await gateway.rank(request)

    @app.post("/v1/rank:batch", responses=REFUSED)
    async def rank_batch(request: api.BatchRequest) -> api.BatchResponse:
        """The intents for several sessions."""
        return api.BatchResponse(responses=await gateway.rank_batch(request.requests))

    @app.get("/v1/models")
    async def models() -> list[api.ServedVersion]:
        """What is served."""
        return [gateway.version]

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The gateway runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(response: Response) -> dict[str, str]:
        """All models answer."""
        if await ready():
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "not ready"}

    return app


def _refused(found: list[api.Refusal]) -> JSONResponse:
    return JSONResponse([refusal.model_dump() for refusal in found], status_code=422)
