"""One generation in a thread of its own, its text handed to the event loop piece by piece."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from mmfix_decoding import Decoder, TokenEvent
from mmfix_evals.serve.chat_request import ChatRequest
from mmfix_evals.serve.errors import from_exception
from mmfix_evals.serve.stops import Text

LOG = logging.getLogger("mmfix.serve")


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Sees every token as it is chosen: counts the prompt, notes the first token, and ends what nobody waits for.

    Args:
        cancelled: when set, the token at hand is the last.
        context: tokens that the model can hold; None for no limit.
    """

    def __init__(self, cancelled: threading.Event, context: int | None) -> None:
        self.prompt_tokens = 0
        self.first_token: float | None = None
        self.full = False
        self._cancelled = cancelled
        self._context = context

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1]
        if self.first_token is None:
            self.first_token = time.perf_counter()
            self.prompt_tokens = length - 1
        self.full = self._context is not None and length >= self._context
        done = self.full or self._cancelled.is_set()
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Piece:
    """Text that became certain, and the tokens read for it."""

    text: str
    events: list[TokenEvent] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """How a generation ended.

    Args:
        finish_reason: ``"stop"`` or ``"length"``.
        prompt_tokens, completion_tokens: usage.
        first_token: clock (``time.perf_counter``) of the first token; None if there was none.
        report: ``Mitigation.report()`` as a dict.
        cancelled: whether it was ended from outside.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    first_token: float | None
    report: dict[str, Any] | None
    cancelled: bool


class Generation:
    """Runs one request on the model.

    Args:
        decoder: model with the request's method.
        request: what to answer.
        context: tokens that the model can hold, prompt and answer together; None where the model does not say.
    """

    def __init__(self, decoder: Decoder, request: ChatRequest, context: int | None) -> None:
        self._decoder = decoder
        self._request = request
        self._context = context
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | End | BaseException] = asyncio.Queue()
        self.finished = asyncio.Event()
        self.end: End | None = None
        self._thread = threading.Thread(target=self._run, name="mmfix-serve", daemon=True)

    def start(self) -> None:
        """Begin; the model must be free."""
        self._thread.start()

    def cancel(self) -> None:
        """End after the token at hand; :attr:`finished` is set when the model is free."""
        self._cancelled.set()

    async def next(self) -> Piece | End:
        """The next piece, and at last the end. Raises :class:`ApiError` when the generation failed."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise from_exception(item)
        return item

    def _run(self) -> None:
        try:
            self.end = self._generate()
            self._put(self.end)
        except BaseException as error:
            if from_exception(error).status >= 500:
                LOG.error("generation failed", exc_info=error)
            self._put(error)
        finally:
            self._call(self.finished.set)

    def _generate(self) -> End:
        request, text = self._request, Text(self._request.stop)
        watch = Watch(self._cancelled, self._context)
        stream = self._decoder.chat(
            request.messages,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            max_prompt_tokens=self._prompt_limit(),
            stopping_criteria=StoppingCriteriaList([watch]),
            **request.generation,
        )
        count, unsent = 0, list[TokenEvent]()
        with stream:
            for event in stream:
                count += 1
                unsent.append(event)
                if (piece := text.add(event.text)) or request.logprobs:
                    self._put(Piece(piece, unsent))
                    unsent = []
                if text.stopped or self._cancelled.is_set():
                    break
        if (rest := text.finish()) or (unsent and request.logprobs):
            self._put(Piece(rest, unsent))
        cut = not text.stopped and (count >= request.max_new_tokens or watch.full)
        reason = "length" if cut else "stop"
        return End(reason, watch.prompt_tokens, count, watch.first_token, stream.report, self._cancelled.is_set())

    def _prompt_limit(self) -> int | None:
        """Most tokens of the prompt: the answer asked for must fit behind it, or at least one token of it."""
        if self._context is None:
            return None
        return max(self._context - (self._request.max_new_tokens if self._request.explicit else 1), 0)

    def _put(self, item: Piece | End | BaseException) -> None:
        self._call(self._queue.put_nowait, item)

    def _call(self, function: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the server has been stopped and nobody waits
            self._cancelled.set()
