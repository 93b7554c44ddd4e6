"""Seeds that neither the batch, nor the order, nor another thread can change."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mmfix_decoding.prompts import Request

# torch.multinomial inside generate() draws from the generator of the whole process.
_DRAWING = threading.RLock()


def request_seed(seed: int, request: Request) -> int:
    """A seed in [0, 2⁶³) from the call's seed and the request's own contents: its place in a list plays no part."""
    digest = hashlib.sha256(b"%d;" % seed + request.digest()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside the block, on the CPU and on `device`; afterwards the caller's random state is back."""
    cuda = [device] if device.type == "cuda" else []
    with _DRAWING, torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


class DrawWindow(LogitsProcessor):  # type: ignore[misc]
    """Seeds the draws of a ``generate()`` that runs beside its caller, token by token.

    The random state is swapped in when the logits of a token are processed and out as soon as the token is drawn
    (:meth:`leave`), so that the caller's own draws between two tokens neither change the stream nor are changed by it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._mine = torch.Generator(device).manual_seed(seed).get_state()
        self._theirs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _DRAWING.acquire()
        self._theirs = self._swap(self._mine)
        return scores

    def leave(self) -> None:
        """Put the caller's random state back; does nothing outside a window."""
        if self._theirs is not None:
            self._mine = self._swap(self._theirs)
            self._theirs = None
            _DRAWING.release()

    def _swap(self, state: Tensor) -> Tensor:
        """Set the random state of the device; the state before."""
        if self._device.type == "cuda":
            before = torch.cuda.get_rng_state(self._device)
            torch.cuda.set_rng_state(state, self._device)
        else:
            before = torch.get_rng_state()
            torch.set_rng_state(state)
        return before
