"""How many prompts at once: a size that fits, found before the first batch, and halved when memory runs out.

Answers do not depend on it: every request is padded, seeded and decoded by itself (in float32; in half precision the
last digit of a logit may depend on its neighbours, as everywhere).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmfix_evals.errors import UsageError

AUTO = "auto"
CPU_SIZE = 16  # a processor is busy with that, and its memory is not asked for in advance
MOST = 256
MARGIN = 1.5  # a probe writes a few tokens only; the cache of a whole answer comes on top
_MESSAGES = (
    "out of memory",  # CUDA, ROCm, MPS, XPU
    "can't allocate memory",  # the CPU allocator of torch
    "not enough memory",  # the same on Windows
    "cannot allocate memory",  # the system's own words (ENOMEM)
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def parse_size(text: str) -> int | str:
    """``"16"`` → 16, ``"auto"`` → ``"auto"``."""
    word = text.strip().lower()
    if word == AUTO:
        return AUTO
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"--batch-size {text!r}: give a number of 1 or more, or auto") from None


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether a smaller batch may help: torch's own error, the plain RuntimeError of its CPU allocator, Python's."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, (RuntimeError, OSError)) and any(words in str(problem).lower() for words in _MESSAGES)


def release() -> None:
    """Give back what the failed batch held; to be called when its exception is no longer referred to."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Memory:
    """What a device tells about its memory: bytes that are free now, and the most in use since ``reset``."""

    reset: Callable[[], None]
    used: Callable[[], int]
    peak: Callable[[], int]
    free: Callable[[], int]


def device_memory(device: Any) -> Memory | None:
    """The memory of a CUDA device; None for one that does not tell."""
    import torch

    if not str(device).startswith("cuda") or not torch.cuda.is_available():
        return None

    def free() -> int:
        # What torch has reserved and does not use is free to it as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)

    return Memory(
        reset=lambda: torch.cuda.reset_peak_memory_stats(device),
        used=lambda: int(torch.cuda.memory_allocated(device)),
        peak=lambda: int(torch.cuda.max_memory_allocated(device)),
        free=free,
    )


def find_size(attempt: Callable[[int], None], memory: Memory | None, most: int = MOST) -> int:
    """The largest power of two up to ``most`` that fits, found by doubling.

    Args:
        attempt: ask that many prompts; raises when memory runs out.
        memory: of the device. With it the search stops before memory runs out; without it only the failure of an
            attempt tells, and :data:`CPU_SIZE` is the limit.

    Raises:
        whatever ``attempt`` raises for another reason than memory.
    """
    size, limit = 1, most if memory is not None else min(most, CPU_SIZE)
    if memory is None:
        return limit
    while size <= limit:
        memory.reset()
        before = memory.used()
        if not _fits(attempt, size):
            break
        need = (memory.peak() - before) * 2 * MARGIN
        if need > memory.free():
            size *= 2
            break
        size *= 2
    return max(1, size // 2)


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
    else:
        return True
    release()
    return False
