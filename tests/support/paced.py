"""Answers no faster than their reader, for tests of what happens while one grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mmfix_decoding import Decoder


class Paced:
    """A stream no faster than a reader, whatever the machine: a pause before each token, and a halt after some.

    Args:
        stream: what is slowed.
        pause: seconds before each token.
        halt: tokens after which nothing comes until the stream is cancelled; None never halts.
    """

    def __init__(self, stream: Any, pause: float, halt: int | None = None) -> None:
        self._stream = stream
        self._pause = pause
        self._halt = halt
        self._go = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        for count, event in enumerate(self._stream):
            if count == self._halt:
                assert self._go.wait(60), "nobody cancelled"
            if self._go.is_set():
                continue  # made ahead of the reader, before the stop: a slower model would not have
            time.sleep(self._pause)
            yield event
        assert self._halt is None or self._go.is_set(), f"the answer ended before token {self._halt}: nothing to stop"

    def cancel(self) -> None:
        self._stream.cancel()
        self._go.set()

    def close(self) -> None:
        self._go.set()
        self._stream.close()

    @property
    def report(self) -> Any:
        return self._stream.report


def pace(monkeypatch: pytest.MonkeyPatch, pause: float = 0.0, halt: int | None = None) -> None:
    """Slow the answers of the running app, which lives in this process."""
    made = Decoder.stream_pair
    monkeypatch.setattr(Decoder, "stream_pair", lambda *a, **k: Paced(made(*a, **k), pause, halt))
