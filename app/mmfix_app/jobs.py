"""Which visitor has something running, so that Stop, or leaving the page, ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr


class Jobs:
    """One cancel flag per run, by visitor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, list[threading.Event]] = {}

    @contextmanager
    def running(self, visitor: str | None) -> Iterator[threading.Event]:
        """A flag that is set when the visitor stops or leaves."""
        flag = threading.Event()
        with self._lock:
            self._running.setdefault(visitor or "", []).append(flag)
        try:
            yield flag
        finally:
            with self._lock:
                flags = self._running[visitor or ""]
                flags.remove(flag)
                if not flags:
                    del self._running[visitor or ""]

    def stop(self, request: gr.Request) -> None:
        """The Stop button."""
        self._set(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._set(request.session_hash)

    def _set(self, visitor: str | None) -> None:
        with self._lock:
            for flag in self._running.get(visitor or "", []):
                flag.set()

    def __len__(self) -> int:
        return len(self._running)
