"""The routes, and the guard before them."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mmfix_evals.serve.chat import Chat
from mmfix_evals.serve.errors import ApiError
from mmfix_evals.serve.service import Service
from mmfix_evals.serve.settings import is_loopback

OPEN = frozenset({"/healthz"})


def create_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    routes = Routes(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    return Starlette(
        routes=[
            Route("/healthz", routes.health, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/v1/chat/completions", Chat(service), methods=["POST"]),
        ],
        exception_handlers={ApiError: routes.refused, HTTPException: routes.no_route},
        middleware=[Middleware(Guard, service=service)],
        lifespan=lifespan,
    )


class Routes:
    """Everything but the chat."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self._service.line.waiting})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(n) for n in self._service.catalogue.names()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.catalogue.choose(name, None)
        return JSONResponse(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        arm = self._service.catalogue.choose(name, None)
        return {
            "id": name, "object": "model", "created": self._service.created, "owned_by": "mmfix",
            "mmfix": {"method": arm.name, "methods": list(arm.spec)},
        }  # fmt: skip

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return respond(self._service, error)

    async def no_route(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        what = f"{request.method} {request.url.path[:200]}"
        if status == 405:
            return respond(self._service, ApiError(405, f"{what}: use another method", "method_not_allowed"))
        message = f"{what} is nothing that is served here; the API is under /v1"
        return respond(self._service, ApiError(status, message, "not_found"))


def respond(service: Service, error: ApiError) -> Response:
    """An error as response, counted."""
    service.metrics.errors.add(code=error.code)
    return JSONResponse(error.body(), error.status, error.headers())


class Guard:
    """Lets in requests that carry the token, or, without one, that were addressed to this machine itself.

    The second keeps out web pages in a browser here which reach this server through a name of their own.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await respond(self._service, refusal)(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        key = self._service.settings.api_key
        if key is not None:
            given = request.headers.get("authorization", "").encode()
            if request.url.path in OPEN or hmac.compare_digest(given, b"Bearer " + key.encode()):
                return None
            return ApiError(401, "no valid token; send Authorization: Bearer TOKEN", "invalid_api_key")
        if self._service.settings.local and not is_loopback(_host(request)):
            return ApiError(403, "this server answers to localhost only; use that name, or a token", "invalid_host")
        return None


def _host(request: Request) -> str:
    """The name in the Host header, without port and brackets."""
    host = request.headers.get("host", "").rpartition("@")[2]
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
