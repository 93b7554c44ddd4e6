"""The dispatcher: one entry, several backends, each able to say why it cannot serve a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from mmfix_kernels import perhead, reference, sdpa, triton
from mmfix_kernels.call import Attended, AttentionCall

ENVIRONMENT = "MMFIX_BACKEND"


class Backend(NamedTuple):
    """One way to compute a call. `unusable` says why it can serve no call at all on this machine; "" when it can."""

    why_not: Callable[[AttentionCall], str]
    attend: Callable[[AttentionCall], Attended]
    unusable: Callable[[], str] = str


# In order of choice.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.why_not, triton.attend, triton.unusable),
    "sdpa": Backend(sdpa.why_not, sdpa.attend),
    "reference": Backend(reference.why_not, reference.attend),
}
# Chosen only when named, until they have been measured on a GPU.
OPT_IN = ("triton",)

# Called with every call that is served, in any thread; empty but for the length of an `observed` block.
_OBSERVERS: list[Callable[[AttentionCall], None]] = []


@contextmanager
def observed(observer: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Let `observer` see every attention call served inside the block, calls of other threads included."""
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


def backends() -> dict[str, str]:
    """Name of each backend → "" when usable on this machine, else the reason why not."""
    return {name: backend.unusable() for name, backend in BACKENDS.items()}


def forced_backend() -> str | None:
    """The backend named by ``MMFIX_BACKEND``; ``ValueError`` when there is none of that name."""
    name = os.environ.get(ENVIRONMENT) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT}={name!r}: no such backend; choose one of {', '.join(BACKENDS)} or unset it")
    return name


def grouped_attention(call: AttentionCall, backend: str | None = None) -> Attended:
    """Attention with edits on key groups, by the first backend that can serve the call.

    Args:
        call: tensors, groups and edits.
        backend: force one by name.

    Raises:
        ValueError: a forced backend cannot serve the call; an edit that labels per head do not allow.
    """
    for observer in _OBSERVERS:
        observer(call)
    if perhead.needed(call):
        return perhead.attend(call, lambda folded: _serve(folded, backend))
    return _serve(call, backend)


def _serve(call: AttentionCall, backend: str | None) -> Attended:
    if backend is not None:
        reason = BACKENDS[backend].why_not(call)
        if reason:
            raise ValueError(f"backend {backend!r} cannot serve this call: {reason}; unset {ENVIRONMENT}")
        return BACKENDS[backend].attend(call)
    reasons: list[str] = []
    for name, candidate in BACKENDS.items():
        if name in OPT_IN and os.environ.get(ENVIRONMENT) != name:
            continue
        reason = candidate.why_not(call)
        if not reason:
            attended = candidate.attend(call)
            return replace(attended, reason="; ".join(reasons)) if reasons else attended
        if not candidate.unusable():  # what the machine lacks stands in `backends()`, not in every call
            reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference serves every call")
