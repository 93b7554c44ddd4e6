"""What attention did, without its map: how much each key received, and how far head outputs are apart.

``column_mass``      c_j = sum over the chosen rows i of w_ij, w the softmax after score edits: a heat-map of the keys
``row_weights``      w_ij of a few chosen rows i, before any edit
``head_divergence``  d_h = || A_h - A'_h ||_2 of head outputs with and without the image (VHR's VHD), and ||A'_h||^2

The first and the last have a reference in float32 that is the definition, a Triton kernel that is taken when the
backend `triton` is named, and say why it did not serve.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmfix_kernels import closed_forms, perhead, triton
from mmfix_kernels.attention import forced_backend, grouped_attention
from mmfix_kernels.call import AttentionCall, additive_mask
from mmfix_kernels.edits import MapReplacement, MassMove, Rows, ScoreEdit
from mmfix_kernels.keyed import KeyGain, KeyMove

_ON_MAPS = (ScoreEdit, KeyGain, MassMove, KeyMove, MapReplacement)  # edits that change a map


class ColumnMass(NamedTuple):
    """mass: Float32[B, H, S]; backend and reason as in :class:`mmfix_kernels.Attended`."""

    mass: Tensor
    backend: str
    reason: str = ""


class Divergence(NamedTuple):
    """distance, size: Float32[B, H]; backend and reason as in :class:`mmfix_kernels.Attended`."""

    distance: Tensor
    size: Tensor
    backend: str
    reason: str = ""


def _check(backend: str | None, reason: str) -> str:
    """Which way to take: "triton" where it is wanted and serves, else ""; ``ValueError`` when a forced one cannot."""
    if backend not in (None, "triton", "sdpa", "reference"):
        raise ValueError(f"backend {backend!r}: choose 'triton', 'sdpa', 'reference' or None")
    if backend == "triton" and reason:
        raise ValueError(f"backend 'triton' cannot serve this call: {reason}")
    wanted = backend or forced_backend()
    return "triton" if wanted == "triton" and not reason else ""


def why_no_column_kernel(call: AttentionCall) -> str:
    """Why the Triton kernel cannot serve the call; "" when it can."""
    if any(isinstance(edit, (MassMove, KeyMove, MapReplacement)) for edit in call.edits):
        return "the column kernel knows the softmax only, not what is done to its weights"
    if call.prefix_key is not None:
        return "the column kernel reads no shared prefix"
    return triton.why_not(replace(call, masses="none"))


def column_mass(call: AttentionCall, rows: Rows = Rows.ALL, backend: str | None = None) -> ColumnMass:
    """Attention that each key receives from the chosen rows.

    Args:
        call: tensors, groups and edits; mass moves and replaced maps count as they change the weights, head scales
            do not touch a map.
        rows: rows that are summed; other than all needs `call.groups`.
        backend: force one by name.

    Returns:
        Float32[B, H, S]. With one row it is the row's weights; over all rows it sums to the number of rows that see
        a key.

    Raises:
        ValueError: the forced backend cannot serve the call, or rows without groups.
    """
    if rows is not Rows.ALL and call.groups is None:
        raise ValueError(f"rows={rows}: which rows these are stands in the call's groups; give groups or Rows.ALL")
    if perhead.needed(call):
        found = column_mass(perhead.fold(call), rows, backend)
        return found._replace(mass=found.mass.view(*call.query.shape[:2], -1))
    reason = why_no_column_kernel(call)
    if _check(backend, reason) == "triton":
        from mmfix_kernels.triton.columns import column_mass as kernel

        return ColumnMass(kernel(call, rows), "triton")
    told = reason if forced_backend() == "triton" else ""
    edited = any(isinstance(edit, _ON_MAPS) for edit in call.edits)
    if backend == "reference" or edited or call.softcap is not None or call.prefix_key is not None:
        return ColumnMass(column_reference(call, rows), "reference", told)
    return ColumnMass(_column_chunks(call, rows), "sdpa", told)


def row_weights(call: AttentionCall, rows: Tensor) -> Tensor:
    """Plain attention weights of chosen rows: the softmax of scores that no edit has touched.

    Args:
        call: tensors and mask; its edits are left out.
        rows: Int64[B, n], row numbers within the call.

    Returns:
        Float32[B, H, n, S]; a row that sees no key has zeros.
    """
    b, h, q_len, d = call.query.shape
    h_kv, n = call.key.shape[1], rows.shape[1]
    query = call.query.float().gather(2, rows[:, None, :, None].expand(b, h, n, d))
    key = call.whole(call.prefix_key, call.key).float()
    scores = query.reshape(b, h_kv, -1, d) @ key.transpose(-1, -2) * call.factor  # heads of one key head lie together
    scores = scores.view(b, h, n, -1)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = additive_mask(call)
    if mask is None:
        return scores.softmax(-1)
    mask = mask.expand(b, mask.shape[1], q_len, call.keys)
    index = rows[:, None, :, None].expand(b, mask.shape[1], n, call.keys)
    scores = scores + mask.gather(2, index)
    return scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)


def column_reference(call: AttentionCall, rows: Rows = Rows.ALL) -> Tensor:
    """The definition: the whole map, which attention itself returns when the values are the identity."""
    b, h_kv, _, _ = call.key.shape
    edits = [e for e in call.edits if isinstance(e, _ON_MAPS)]
    key = call.whole(call.prefix_key, call.key).float()
    value = torch.eye(call.keys, device=key.device).expand(b, h_kv, -1, -1)
    whole = replace(
        call, query=call.query.float(), key=key, value=value, prefix_key=None, prefix_value=None, edits=edits,
        masses="none",
    )  # fmt: skip
    weights = grouped_attention(whole, "reference").output
    chosen = chosen_rows(call, rows)
    return (weights if chosen is None else weights * chosen[:, None, :, None]).sum(2)


def chosen_rows(call: AttentionCall, rows: Rows) -> Tensor | None:
    """Bool[B, L] of the rows that are summed; None means all."""
    return None if call.groups is None else call.groups.rows[rows]


def _column_chunks(call: AttentionCall, rows: Rows) -> Tensor:
    """The definition for plain attention, a chunk of rows at a time."""
    chosen = chosen_rows(call, rows)
    first = 0 if call.groups is None else call.groups.first[rows]
    b, h, length, _ = call.query.shape
    out = torch.zeros(b, h, call.key.shape[2], device=call.query.device)
    step = max(1, closed_forms.CHUNK // (b * h * call.key.shape[2]))
    for start in range(first, length, step):
        stop = min(length, start + step)
        weights, _ = closed_forms.plain_weights(call, start, stop)
        out += (weights if chosen is None else weights * chosen[:, None, start:stop, None]).sum(2)
    return out


def why_no_divergence_kernel(heads: Tensor) -> str:
    """Why the Triton kernel cannot serve these head outputs; "" when it can."""
    if reason := triton.unusable():
        return reason
    if heads.device.type != "cuda" and not triton.interpreted():
        return "no CUDA device holds the tensors"
    return "" if heads.dtype in triton.DTYPES else f"dtype {heads.dtype}: one of float16, bfloat16, float32"


def head_divergence(heads: Tensor, without: Tensor, backend: str | None = None) -> Divergence:
    """How far head outputs are from those of a second run, as VHR chooses its heads.

    Args:
        heads: [B, H, D], head outputs before the output projection.
        without: [B, H, D], the same without the image.
        backend: force one by name.

    Raises:
        ValueError: shapes differ, or the forced backend cannot serve.
    """
    if heads.shape != without.shape or heads.dim() != 3:
        raise ValueError(f"head outputs {tuple(heads.shape)} and {tuple(without.shape)}: expected [B, H, D] twice")
    reason = why_no_divergence_kernel(heads)
    if _check(backend, reason) == "triton":
        from mmfix_kernels.triton.columns import head_divergence as kernel

        return Divergence(*kernel(heads, without), "triton")
    told = reason if forced_backend() == "triton" else ""
    return Divergence(*divergence_reference(heads, without), "reference", told)


def divergence_reference(heads: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float32."""
    return (heads.float() - without.float()).norm(dim=-1), without.float().square().sum(-1)
