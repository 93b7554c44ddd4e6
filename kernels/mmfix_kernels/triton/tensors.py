"""What the kernels read, made from a call: masks and their strides, key counts, places of keys, small properties."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mmfix_kernels.call import AttentionCall
from mmfix_kernels.edits import KeyGroups, MapReplacement, MassMove, Rows, head_mask
from mmfix_kernels.maps import permutation
from mmfix_kernels.triton.maps import places_kernel


def precision(query: Tensor) -> str:
    """How the matrix products are done: exactly for float32; float16 and bfloat16 have one way only."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return "upcast"
    return "ieee" if query.dtype == torch.float32 else "tf32"


def power_of_two(width: int) -> int:
    """The smallest power of two that is at least `width`, and at least 16 (the narrowest matrix product)."""
    return max(16, 1 << (width - 1).bit_length())


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring elements in its last axis."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_masks(groups: KeyGroups | None) -> dict[Rows, Tensor]:
    """Row masks that exist, as bytes."""
    if groups is None:
        return {}
    return {kind: mask.contiguous().view(torch.uint8) for kind, mask in groups.rows.items() if mask is not None}


def places_of(call: AttentionCall) -> Tensor:
    """Int32[B, S]: `mmfix_kernels.maps.places` in one launch."""
    assert call.groups is not None
    labels = call.groups.labels
    labels = labels if labels.stride(1) == 1 else labels.contiguous()
    places = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
    if labels.device.type != "meta":
        places_kernel[(labels.shape[0],)](labels, places, labels.stride(0), labels.shape[1], BLOCK=1024, num_warps=4)
    return places if call.groups.before is None else places + call.groups.before[:, None].int()


def destinations(call: AttentionCall) -> Tensor:
    """Int32[B, H, S]: the key that takes each key's weight under the call's shuffled map."""
    assert call.groups is not None
    (edit,) = (edit for edit in call.edits if isinstance(edit, MapReplacement))
    b, h, keys = call.query.shape[0], call.query.shape[1], call.keys
    if call.query.device.type == "meta":
        return torch.empty(b, h, keys, dtype=torch.int32, device="meta")
    order = permutation(edit.seed, h, call.groups.labels).argsort(-1)
    itself = torch.arange(keys, device=order.device)
    if edit.heads is not None:
        order = torch.where(head_mask(edit.heads, h, order.device)[None, :, None], order, itself)
    if edit.batch is not None:
        order = torch.where(edit.batch.to(order.device)[:, None, None], order, itself)
    return order.to(torch.int32).contiguous()


def key_counts(call: AttentionCall) -> Tensor:
    """Float32[B, 2]: number of keys of the gate group of each mass move."""
    assert call.groups is not None
    counts = torch.zeros(call.query.shape[0], 2, dtype=torch.float32, device=call.query.device)
    moves = [edit for edit in call.edits if isinstance(edit, MassMove)]
    for n, move in enumerate(moves):
        if move.gate is not None:
            counts[:, n] = call.groups.member(move.gate.group).sum(-1)
    return counts


def prepared_mask(call: AttentionCall) -> tuple[Tensor | None, int, float]:
    """The mask, its kind (0 none, 1 bool, 2 additive) and the number at or below which a key is hidden."""
    if call.mask is None:
        return None, 0, 0.0
    if call.mask.dtype == torch.bool:
        return call.mask.view(torch.uint8), 1, 0.0
    return call.mask, 2, torch.finfo(call.mask.dtype).min


def broadcast_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of the mask over [B, H, L, S], zero where it is broadcast."""
    if mask is None:
        return 0, 0, 0, 0
    sizes, strides = (1,) * (4 - mask.dim()) + tuple(mask.shape), (0,) * (4 - mask.dim()) + mask.stride()
    b, h, rows, keys = (0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
    return b, h, rows, keys


def empty(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Unwritten memory; tests replace this by one that fills it with NaN."""
    return torch.empty(*shape, dtype=dtype, device=like.device)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, and a model may lie on several; a graph has one, and cannot look."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
