"""The gateway as HTTP: routes, and refusals that name the field."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rgalign_ray import __version__
from rgalign_ray.serve import api
from rgalign_ray.serve.access import Access, RefusedError
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.session_reader import SessionError

Healthy = Callable[[], Awaitable[bool]]
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
"""The page is one file and asks nobody but the service."""
Responses = dict[int | str, dict[str, Any]]


def _described(statuses: dict[int, str]) -> Responses:
    return {status: {"model": list[api.Refusal], "description": why} for status, why in statuses.items()}


ASKED = _described({401: "No key, or none that is known.", 429: "Too much is asked; Retry-After tells when to return."})
BODY = ASKED | _described({413: "The body is too large.", 422: "A field is wrong."})
KEPT = _described({507: "It could not be written."})
FEEDBACK = BODY | KEPT | _described({404: "No feedback is kept."})
ANSWERED = BODY | _described({503: "A model does not answer."})
READY = _described({503: "A model does not answer, or the gateway has to be started anew."})
ALIVE = _described({503: "The gateway has to be started anew."})


class BodyLimit:
    """Refuses bodies above a size (413), also those that do not tell theirs; FastAPI's own limit does not say which."""

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
                told = RefusedError(413, f"the body is larger than {self.limit:,} bytes")
                await _told(told)(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


class Guard:
    """Lets pass whom `Access` does."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                self.access.check(scope["path"], headers, (scope.get("client") or ("",))[0])
            except RefusedError as error:
                await _told(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def build(
    gateway: Gateway,
    ready: Healthy,
    access: Access,
    refused: Callable[[], str | None],
    offered: Sequence[api.Example] = (),
) -> FastAPI:
    """The application.

    Args:
        gateway: answers.
        ready: whether all models do.
        access: who may ask.
        refused: why newer versions were not taken.
        offered: sessions for people to try.
    """
    app = FastAPI(
        title="rgalign_ray",
        version=__version__,
        description="Ranks the intents of a user who has typed nothing yet.",
        docs_url=None,  # a page that loads another site's scripts; /openapi.json is the document
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, limit=gateway.settings.max_body_bytes)
    app.add_middleware(Guard, access=access)  # added last, it is asked first

    _refusals(app)
    _answers(app, gateway)
    _told_of(app, gateway, refused, offered)
    _health(app, gateway, ready)
    return app


def _refusals(app: FastAPI) -> None:
    """Whatever is refused is told as a list of fields and what is wrong with them."""

    @app.exception_handler(RefusedError)
    async def _(_: Request, error: RefusedError) -> JSONResponse:
        return _told(error)

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's, for bytes that are no text
            return _refused([api.Refusal(field="", message="the body is not JSON in UTF-8")])
        return _told(RefusedError(error.status_code, error.detail, dict(error.headers or {})))

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


def _answers(app: FastAPI, gateway: Gateway) -> None:
    """What a shop asks and reports."""

    @app.post("/v1/rank", responses=ANSWERED)
    async def rank(request: api.RankRequest) -> api.RankResponse:
        """The intents for one session."""
        return await gateway.rank(request)

    @app.post("/v1/rank:batch", responses=ANSWERED)
    async def rank_batch(request: api.BatchRequest) -> api.BatchResponse:
        """The intents for several sessions."""
        return api.BatchResponse(responses=await gateway.rank_batch(request.requests))

    @app.post("/v1/feedback", responses=FEEDBACK)
    async def feedback(request: api.FeedbackRequest) -> api.FeedbackResponse:
        """What became of an answer; acknowledged once it is on the disk."""
        return await gateway.told(request)

    @app.post("/v1/refresh", responses=ANSWERED | KEPT)
    async def refresh(request: api.RefreshRequest) -> api.RefreshResponse:
        """Reads a user's situation ahead of her visit."""
        return await gateway.refresh(request)

    @app.delete("/v1/users/{user_id:path}", responses=BODY | KEPT)
    async def forget(user_id: api.Id) -> api.ForgetResponse:
        """Removes what is kept of a user."""
        return await gateway.forget(user_id)


def _told_of(app: FastAPI, gateway: Gateway, refused: Callable[[], str | None], offered: Sequence[api.Example]) -> None:
    """What people look at."""

    @app.get("/v1/models", responses=ASKED)
    async def models() -> api.Served:
        """What is served."""
        versions = [variant.version for variant in gateway.variants.by_name.values()]
        return api.Served(variants=versions, refused=refused())

    @app.get("/v1/counts", responses=ASKED)
    async def counts() -> api.Counted:
        """What this gateway has done since it started."""
        return gateway.counts.told()

    @app.get("/v1/examples", responses=ASKED)
    async def examples() -> list[api.Example]:
        """Sessions to try."""
        return list(offered)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": POLICY})


def _health(app: FastAPI, gateway: Gateway, ready: Healthy) -> None:
    """What a load balancer asks."""

    def check() -> None:
        try:
            gateway.check()
        except RuntimeError as error:
            raise RefusedError(503, str(error)) from None

    @app.get("/healthz", responses=ALIVE)
    async def healthz() -> dict[str, str]:
        """The gateway runs."""
        check()
        return {"status": "ok"}

    @app.get("/readyz", responses=READY)
    async def readyz() -> dict[str, str]:
        """The gateway runs, and all models answer."""
        check()
        if not await ready():
            raise RefusedError(503, "a model does not answer")
        return {"status": "ready"}


def _told(error: RefusedError) -> JSONResponse:
    told = [{"field": "", "message": error.message}]
    return JSONResponse(told, status_code=error.status, headers=error.headers)


def _refused(found: list[api.Refusal]) -> JSONResponse:
    return JSONResponse([refusal.model_dump() for refusal in found], status_code=422)
