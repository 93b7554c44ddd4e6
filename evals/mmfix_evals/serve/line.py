"""Who is answered next: one generation at a time, a bounded line behind it, first come first served."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from mmfix_evals.serve.errors import ApiError

LONGEST_WAIT = 60
_SMOOTHING = 0.3


class Line:
    """Admission and turns.

    Args:
        max_queue: most requests beside the one that is being answered.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._admitted = 0
        self._turn = asyncio.Lock()
        self._seconds = 1.0

    @property
    def waiting(self) -> int:
        """Requests that were admitted and do not have the model."""
        return max(self._admitted - self.generating, 0)

    @property
    def generating(self) -> int:
        """1 while the model is in use."""
        return int(self._turn.locked())

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line for the length of the block.

        Raises:
            ApiError: 429 when the line is full, with an estimate of when to come again.
        """
        if self._admitted > self._max_queue:
            wait = min(max(math.ceil(self._seconds * self._admitted), 1), LONGEST_WAIT)
            raise ApiError(
                429, f"{self._admitted} requests are being answered or waiting, as many as this server takes; "
                f"try again in {wait} s", "queue_full", retry_after=wait,
            )  # fmt: skip
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def turn(self) -> None:
        """Wait for the model. It is given back with :meth:`done`."""
        await self._turn.acquire()

    def done(self, seconds: float) -> None:
        """Give the model back after using it for `seconds`."""
        self._seconds += _SMOOTHING * (seconds - self._seconds)
        self._turn.release()
