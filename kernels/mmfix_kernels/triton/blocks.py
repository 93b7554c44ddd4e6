# mypy: ignore-errors
"""Building blocks of the streaming loop: score edits, visibility, and one block of keys into the softmax state.

Sets of labels are bytes (bit n = label n). A key *class* is a set of labels whose weights are scaled alike by every
mass move; each class has its own ``(m, acc)``. A *bin* is a set of labels whose mass is summed apart; the sum of a bin
stands in the column of its lowest label, so a mass over any group is a sum over columns. Scores are in units of log2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def matmul(b_x, b_y, b_acc, PRECISION: tl.constexpr):
    """``acc + x·y`` in float32. "upcast" is for Triton's interpreter, which cannot multiply bfloat16."""
    if PRECISION == "upcast":
        b_out = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc, input_precision="ieee")
    else:
        b_out = tl.dot(b_x, b_y, b_acc, input_precision=PRECISION)
    return b_out


@triton.jit
def edit_scores(b_s, b_bit, b_touched, gain, abs_gain, bias, GROUP: tl.constexpr):
    """``s' = gain*s + abs_gain*|s| + bias`` on touched rows and keys of GROUP. b_s [M, N], b_bit [N], b_touched [M]."""
    b_in = (b_bit & GROUP) != 0  # [N]
    b_edited = gain * b_s + abs_gain * tl.abs(b_s) + bias * LOG2E
    return tl.where(b_touched[:, None] & b_in[None, :], b_edited, b_s)


@triton.jit
def see(b_seen, b_allowed, b_bit, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """Set bit k of b_seen [M] where the row may attend to a key of group k. b_allowed [M, N]."""
    for k in tl.static_range(COUNT):
        b_in = (b_bit & ((GROUPS >> (8 * k)) & 255)) != 0  # [N]
        b_any = tl.max((b_allowed & b_in[None, :]).to(tl.int32), axis=1)  # [M]
        b_seen = b_seen | (b_any << k)
    return b_seen


@triton.jit
def see_all(b_seen, b_bit, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """The same where every row may attend to every key of the block: one reduction over [N]."""
    for k in tl.static_range(COUNT):
        b_in = (b_bit & ((GROUPS >> (8 * k)) & 255)) != 0  # [N]
        b_seen = b_seen | (tl.max(b_in.to(tl.int32), axis=0) << k)
    return b_seen


@triton.jit
def absorb(
    b_s, b_v, b_bit, b_m, b_sum, b_acc,
    CLASS: tl.constexpr, BINS: tl.constexpr, N_BINS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the state of one class.

    ``m' = max(m, max s)``, ``a = exp(m - m')``, ``sum' = a*sum + sum p``, ``acc' = a*acc + p·v``.

    b_s [M, N] is -inf wherever the key is hidden or of another class; b_m [M]; b_acc [M, D]. b_sum is [M, 8] with one
    column per bin, or [M] without bins (N_BINS = 0).
    """
    b_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_safe = tl.where(b_new == NEG_INF, 0.0, b_new)  # a class with no key yet: exp(-inf - 0) = 0, never NaN
    b_p = tl.math.exp2(b_s - b_safe[:, None])  # [M, N]
    b_alpha = tl.math.exp2(b_m - b_safe)  # [M]
    if N_BINS == 0:
        b_sum = b_sum * b_alpha + tl.sum(b_p, axis=1)
    else:
        b_column = (tl.zeros([8], tl.int32) + 1) << tl.arange(0, 8)  # [8], the bit of each label
        b_part = tl.zeros_like(b_sum)
        for k in tl.static_range(N_BINS):
            if (((BINS >> (8 * k)) & 255) & CLASS) != 0:
                if ((BINS >> (8 * k)) & 255) == CLASS:
                    b_mass = tl.sum(b_p, axis=1)
                else:
                    b_mass = tl.sum(tl.where(((b_bit & ((BINS >> (8 * k)) & 255)) != 0)[None, :], b_p, 0.0), axis=1)
                # x & -x is the lowest bit of x: the column of the bin
                b_here = b_column == (((BINS >> (8 * k)) & 255) & -((BINS >> (8 * k)) & 255))
                b_part = tl.where(b_here[None, :], b_mass[:, None], b_part)
        b_sum = tl.where(((b_column & CLASS) != 0)[None, :], b_sum * b_alpha[:, None] + b_part, b_sum)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = matmul(b_p.to(b_v.dtype), b_v, b_acc, PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def absorb_some(
    b_s, b_v, b_bit, b_m, b_sum, b_acc,
    CLASS: tl.constexpr, BINS: tl.constexpr, N_BINS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`absorb` for one of several classes; a block without a key of the class costs one reduction over [N]."""
    b_in = (b_bit & CLASS) != 0  # [N]
    if tl.max(b_in.to(tl.int32), axis=0) > 0:
        b_mine = tl.where(b_in[None, :], b_s, NEG_INF)
        b_m, b_sum, b_acc = absorb(b_mine, b_v, b_bit, b_m, b_sum, b_acc, CLASS, BINS, N_BINS, PRECISION)
    return b_m, b_sum, b_acc
