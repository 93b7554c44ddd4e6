"""Tokens as they are generated: ``generate()`` in a worker thread, watched from inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from mmfix_decoding.answer import Detokenizer, TokenEvent
from mmfix_decoding.sampling import DrawWindow

Report = dict[str, Any]
Emit = Callable[[TokenEvent], None]


class Tap(StoppingCriteria):  # type: ignore[misc]
    """Reports each token of a ``generate()`` of one sequence, and stops it on request.

    A stopping criterion is the one place that ``generate()`` calls after a token is chosen, with the final scores.

    Args:
        tokenizer: to turn ids into text.
        stop_ids: ids that end the answer; they make no event.
        masses: gives the group masses of the newest token.
        emit: receives the events, in order.
        cancelled: when set, generation ends after the token at hand.
        window: closed as soon as a token is drawn.
        weights: gives the newest token's weights over the image tokens.
        side: of a paired stream.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: frozenset[int],
        masses: Callable[[], dict[str, float] | None],
        emit: Emit,
        cancelled: threading.Event,
        window: DrawWindow | None,
        weights: Callable[[], tuple[float, ...] | None] = lambda: None,
        side: str = "",
    ) -> None:
        self._text = Detokenizer(tokenizer)
        self._stop_ids = stop_ids
        self._masses = masses
        self._emit = emit
        self._cancelled = cancelled
        self._window = window
        self._weights = weights
        self._side = side
        self._ended = False
        self._held: TokenEvent | None = None  # a token whose text is unfinished: it may turn out to be the last
        self._count = 0

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **kwargs: Any) -> Tensor:
        if self._window is not None:
            self._window.leave()
        self.step(int(input_ids[0, -1]), scores[-1][0])
        # generate() keeps the scores of every step; a vocabulary of floats per token would add up.
        scores[-1].data = scores[-1].new_empty(0)
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), dtype=torch.bool, device=input_ids.device)

    def step(self, token: int, scores: Tensor) -> None:
        """Report one token of the sequence, chosen from `scores` [vocabulary]; nothing once it has ended."""
        self._ended = self._ended or token in self._stop_ids
        if not self._ended:
            self._token(token, scores)

    def _token(self, token: int, scores: Tensor) -> None:
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        entropy = torch.special.entr(logprobs.exp()).sum()
        logprob, nats = torch.stack([logprobs[token], entropy]).tolist()
        text = self._text.add(token)
        self._release()
        event = TokenEvent(text, token, logprob, nats, self._masses(), self._count, self._weights(), self._side)
        self._count += 1
        if self._text.waiting:
            self._held = event
        else:
            self._emit(event)

    def _release(self, more: str = "") -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._emit(replace(held, text=held.text + more))

    def finish(self) -> None:
        """No further token will come: hand out what was held back."""
        self._release(self._text.flush())


class _End:
    def __init__(self, error: BaseException | None, report: Report | None) -> None:
        self.error = error
        self.report = report


class TokenStream(Iterator[TokenEvent]):
    """Iterator over the :class:`TokenEvent` of one answer; made by :meth:`mmfix_decoding.Decoder.stream`.

    Generation starts with the first ``next()`` and runs ahead of its reader. Leaving early (:meth:`close`, a ``with``
    block, or dropping the iterator, as ``break`` in a ``for`` loop does) ends it after the token at hand and returns
    once the model is restored. An error during generation is raised by ``next()``.
    """

    def __init__(self, produce: Callable[[Emit, threading.Event], Report | None]) -> None:
        # The worker holds no reference to the stream: a dropped stream must be collected, and thereby closed.
        self._queue: SimpleQueue[TokenEvent | _End] = SimpleQueue()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run,
            args=(_work, produce, self._queue, self._cancelled),
            name="mmfix-stream",
            daemon=True,
        )
        self._started = self._finished = False
        self._report: Report | None = None

    @property
    def report(self) -> Report | None:
        """``Mitigation.report()`` as a dict, once the stream has ended; None before, and without a method."""
        return self._report

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        if self._finished:
            raise StopIteration
        if not self._started:
            self._started = True
            self._thread.start()
        try:
            item = self._queue.get()
        except BaseException:  # Ctrl-C while waiting
            self.close()
            raise
        if isinstance(item, TokenEvent):
            return item
        self._settle(item)
        raise StopIteration

    def cancel(self) -> None:
        """Ask for an end after the token at hand, from any thread; the iterator then ends, and nobody is waited for."""
        self._cancelled.set()

    def close(self) -> None:
        """End the generation; returns when the model is as before. Safe to call again, and on a finished stream."""
        self._cancelled.set()
        if not self._started or self._finished:
            self._finished = True
            return
        while not isinstance(item := self._queue.get(), _End):
            pass
        self._settle(item)

    def _settle(self, end: _End) -> None:
        self._finished = True
        self._thread.join()
        self._report = end.report
        if end.error is not None:
            raise end.error

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if threading.current_thread() is not self._thread:  # the collector may run anywhere
            self.close()


def _work(
    produce: Callable[[Emit, threading.Event], Report | None],
    queue: SimpleQueue[TokenEvent | _End],
    cancelled: threading.Event,
) -> None:
    error: BaseException | None = None
    report: Report | None = None
    try:
        report = produce(queue.put, cancelled)
    except BaseException as caught:
        error = caught
    queue.put(_End(error, report))
