"""``POST /v1/chat/completions``: read, wait for the model, answer; let go as soon as the client does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from mmfix_evals.serve import replies
from mmfix_evals.serve.chat_request import ChatRequest
from mmfix_evals.serve.errors import ApiError
from mmfix_evals.serve.generation import LOG, End, Generation
from mmfix_evals.serve.service import Service

GONE = 499
SEND_SECONDS = 60.0  # a client that reads nothing for so long is taken to have left
DRAIN_SECONDS = 2.0
T = TypeVar("T")


class ClientGone(Exception):  # noqa: N818 - an event, not a mistake
    """The client has closed its connection."""


class Chat:
    """The endpoint, as an ASGI application: it listens for the client's leaving while it works."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(self._service, Request(scope, receive), send)
        try:
            with self._service.line.place():
                await exchange.answer()
        except (ClientGone, ClientDisconnect):
            exchange.status = GONE
        except ApiError as error:
            await exchange.fail(error, scope, receive)
        finally:
            exchange.account()


class _Exchange:
    """One request and its answer."""

    def __init__(self, service: Service, request: Request, send: Send) -> None:
        self._service = service
        self._request = request
        self._send = send
        self._arrived = time.perf_counter()
        self._method = ""
        self._started = False  # whether the head of the response has been sent
        self.status = 200

    async def answer(self) -> None:
        chat = await asyncio.to_thread(self._service.parse, await self._body())
        self._method = self._service.catalogue.label(chat.arm)
        self._service.metrics.images.add(chat.images)
        gone = asyncio.create_task(_disconnect(self._request))
        generation = self._service.generation(chat)
        try:
            await _unless(gone, self._service.begin(generation, self._method, self._arrived))
            reply = replies.Reply(chat, self._service.tokenizer)
            await (self._stream if chat.stream else self._whole)(chat, reply, generation, gone)
        finally:
            generation.cancel()  # does nothing where it has ended
            gone.cancel()

    async def _whole(
        self, chat: ChatRequest, reply: replies.Reply, generation: Generation, gone: asyncio.Task[None]
    ) -> None:
        text, events = "", []
        while not isinstance(item := await _unless(gone, generation.next()), End):
            text += item.text
            events += item.events
        await self._respond(JSONResponse(reply.completion(text, events, item)))

    async def _stream(
        self, chat: ChatRequest, reply: replies.Reply, generation: Generation, gone: asyncio.Task[None]
    ) -> None:
        item = await _unless(gone, generation.next())  # what goes wrong before the first token gets its own status
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._put({"type": "http.response.start", "status": 200, "headers": headers})
        self._started = True
        await self._write(reply.start())
        while not isinstance(item, End):
            await self._write(reply.piece(item.text, item.events))
            item = await _unless(gone, generation.next())
        await self._write(reply.end(item))
        await self._write(b"", last=True)

    async def _body(self) -> bytes:
        """The request's body, within the limits of size and time."""
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also what keeps web pages from posting here without asking first
            raise ApiError(415, "send Content-Type: application/json", "unsupported_media_type")
        most, chunks, size = self._service.settings.max_body_bytes, [], 0
        declared = self._request.headers.get("content-length", "")
        too_large = ApiError(
            413, f"the request has more than {most:,} bytes; send fewer or smaller images", "too_large"
        )
        try:
            async with asyncio.timeout(self._service.settings.body_seconds):
                if declared.isdecimal() and int(declared) > most:
                    raise too_large
                async for chunk in self._request.stream():
                    size += len(chunk)
                    if size > most:
                        raise too_large
                    chunks.append(chunk)
        except TimeoutError as error:
            raise ApiError(408, "the request did not arrive in time; send it again", "timeout") from error
        return b"".join(chunks)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error object, or end a stream that has begun with one."""
        self.status = error.status
        self._service.metrics.errors.add(code=error.code)
        try:
            if self._started:
                await self._write(replies.event(error.body()), last=True)
                return
            if error.status == 413:  # closing on a client that still sends would hide the answer from it
                await _drain(receive)
            await self._respond(JSONResponse(error.body(), error.status, error.headers()))
        except ClientGone:
            self.status = GONE

    def account(self) -> None:
        """Count and log the exchange."""
        seconds = time.perf_counter() - self._arrived
        self._service.metrics.requests.add(method=self._method, status=str(self.status))
        if self._method:
            self._service.metrics.seconds.observe(seconds, method=self._method)
        LOG.info("chat %s %d %.2f s", self._method or "-", self.status, seconds)

    async def _respond(self, response: Response) -> None:
        await self._put(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        self._started = True
        await self._put({"type": "http.response.body", "body": response.body})

    async def _write(self, data: bytes, last: bool = False) -> None:
        await self._put({"type": "http.response.body", "body": data, "more_body": not last})

    async def _put(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except (OSError, TimeoutError) as error:
            raise ClientGone from error


async def _disconnect(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    """Take in what the client still sends, for a moment."""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass


async def _unless(gone: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; :class:`ClientGone` if `gone` comes first, and `work` is then cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if task.cancelled():
        raise ClientGone
    return task.result()
