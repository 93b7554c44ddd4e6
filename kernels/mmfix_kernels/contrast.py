"""The contrast step: mix the logits of branch rows, cut implausible tokens, take the best one.

With branch logits ``x_r`` and weights ``c_r`` (row 0 is the plain prompt; VCD: ``c = (1 + alpha, -alpha)``)::

    keep v  iff  x_0[v] >= log(beta) + max x_0          (the plausibility cut, on the plain logits)
    y[v]    =    sum_r c_r * x_r[v]  where kept, else -inf

A token that a branch already holds at -inf stays there, whatever its weight: no difference of infinities is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """logits: Float32[B, V] or None when only the best token was asked for; best: Int64[B]."""

    logits: Tensor | None
    best: Tensor


def check(logits: Tensor, weights: tuple[float, ...], beta: float) -> None:
    """``ValueError`` unless logits are [B, R, V] with one weight per row and beta is a share."""
    if logits.dim() != 3 or logits.shape[1] != len(weights) or not weights:
        raise ValueError(f"logits {tuple(logits.shape)} with {len(weights)} weights: expected [B, R, V], one per row")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: the plausibility cut is a share of the largest probability, 0 (off) to 1")


def mix_reference(logits: Tensor, weights: tuple[float, ...], beta: float = 0.0) -> Mixed:
    """The definition, in float32.

    Args:
        logits: [B, R, V]; row 0 is the plain prompt.
        weights: one per row.
        beta: the cut keeps tokens of at least `beta` times the largest probability; 0 keeps all.

    Raises:
        ValueError: shapes or beta do not fit.
    """
    check(logits, weights, beta)
    x = logits.float()
    mixed = torch.zeros_like(x[:, 0])
    for r, weight in enumerate(weights):
        if weight != 0:
            mixed = mixed + weight * x[:, r]
    dead = x.isneginf().any(1)
    if beta > 0:
        dead |= x[:, 0] < math.log(beta) + x[:, 0].amax(-1, keepdim=True)
    mixed = mixed.masked_fill(dead, float("-inf"))
    return Mixed(mixed, mixed.argmax(-1))


def mix(logits: Tensor, weights: tuple[float, ...], beta: float = 0.0, want_logits: bool = True) -> Mixed:
    """`mix_reference` by one fused kernel on a CUDA device, by PyTorch elsewhere. Arguments as there.

    Args:
        want_logits: False returns the best token only, and nothing of the size of the vocabulary is written.
    """
    check(logits, weights, beta)
    from mmfix_kernels import triton as backend

    served = logits.is_cuda or backend.interpreted()
    if served and not backend.unusable() and logits.dtype in backend.DTYPES:
        from mmfix_kernels.triton.vocabulary import mix as fused

        return Mixed(*fused(logits, weights, beta, want_logits))
    return mix_reference(logits, weights, beta)
