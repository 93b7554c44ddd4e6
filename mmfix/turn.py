"""Whose turn it is: one thread generates at a time, and one pass runs at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmfix.errors import MmfixError


class Turn:
    """Who may call the model, and what kind of call is under way.

    Attributes:
        generating: how many ``generate()`` calls of this thread are open.
        prefilling: whether ``generate()`` is processing its prompt, maybe in pieces.
    """

    def __init__(self) -> None:
        self.generating = 0
        self.prefilling = False
        self._guard = threading.Lock()
        self._owner: int | None = None
        self._frame: FrameType | None = None  # the call of the model that is running

    @contextmanager
    def generation(self) -> Iterator[None]:
        """One ``generate()`` call: no other thread gets between its passes."""
        self._take()
        self.generating += 1
        try:
            yield
        finally:
            self.generating -= 1
            if not self.generating:
                self.prefilling, self._frame = False, None
                self._give()

    def begin(self, frame: FrameType) -> None:
        """A pass begins, called from `frame`.

        Raises:
            MmfixError: another thread is generating, or a pass of this one is running.
        """
        self._take()
        if self._frame is not None and _on_stack(self._frame, sys._getframe()):
            raise MmfixError(
                "the model was called from inside its own forward pass (by a hook, say); inside mitigate() its passes "
                "run one after the other: call it before or after"
            )
        self._frame = frame

    def end(self) -> bool:
        """A pass ends; False where it is not this thread's, so that nothing must be done."""
        if self._owner != threading.get_ident():
            return False
        self._frame = None
        if not self.generating:
            self._give()
        return True

    def _take(self) -> None:
        me = threading.get_ident()
        with self._guard:
            if self._owner not in (None, me) and self._busy():
                raise MmfixError(
                    "a second thread called the model while another one is generating inside mitigate(); their prompts "
                    "would be mixed: let one thread at a time generate"
                )
            if self._owner != me:
                self.generating, self._frame = 0, None
            self._owner = me

    def _give(self) -> None:
        with self._guard:
            self._owner = None

    def _busy(self) -> bool:
        """Whether the owner is still at it; a pass that was torn down (by an interrupt) is not."""
        if self.generating:
            return True
        top = sys._current_frames().get(self._owner or 0)
        return self._frame is not None and top is not None and _on_stack(self._frame, top)


def _on_stack(frame: FrameType, top: FrameType | None) -> bool:
    while top is not None:
        if top is frame:
            return True
        top = top.f_back
    return False
