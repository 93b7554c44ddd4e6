"""What the kernels are given for one call: its tensors with their strides, small tables, compile-time constants."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfix_kernels.call import AttentionCall
from mmfix_kernels.edits import NUM_LABELS, MapReplacement
from mmfix_kernels.triton import plan as plans
from mmfix_kernels.triton import tables, tensors
from mmfix_kernels.triton.masks import summary
from mmfix_kernels.triton.plan import Plan, Tile
from mmfix_kernels.triton.tensors import (
    broadcast_strides,
    destinations,
    key_counts,
    places_of,
    power_of_two,
    precision,
    prepared_mask,
    row_masks,
    unit_stride,
)


def head_scale(call: AttentionCall) -> tuple[Tensor | None, int | None]:
    """The head scale [B or 1, H] that the epilogue applies, and its number in the call."""
    scales = call.head_scales
    if not scales:
        return None, None
    b, h = call.query.shape[:2]
    for _, edit in scales:
        if edit.scale.shape not in ((h,), (b, h)):
            raise ValueError(f"HeadScale.scale {tuple(edit.scale.shape)}: expected [{h}] or [{b}, {h}] (query heads)")
    number, edit = scales[0]
    return edit.scale.to(call.query.device).contiguous(), number


@lru_cache(maxsize=8)
@tables.constant_in_graphs
def capability(device: torch.device) -> int:
    """Major compute capability; 9 where there is no CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 9
    return int(torch.cuda.get_device_capability(device)[0])


class Part(NamedTuple):
    """Neighbouring keys that one launch reads: where they stand among all keys, and how many batch rows share them."""

    key: Tensor
    value: Tensor
    start: int = 0
    branches: int = 1


class Arguments:
    """Tensors of one call, and what each of its launches is given of them."""

    def __init__(
        self, call: AttentionCall, plan: Plan, stats: bool, dtype: torch.dtype, major: int | None = None
    ) -> None:
        self.major = capability(call.query.device) if major is None else major
        b, h, length, _ = call.query.shape
        self.call, self.plan = call, plan
        self.device = call.query.device
        self.scale, _ = head_scale(call)
        self.query, self.key, self.value = (unit_stride(t) for t in (call.query, call.key, call.value))
        self.prefix: tuple[Tensor, Tensor] | None = None
        if call.prefix_key is not None and call.prefix_value is not None:
            self.prefix = unit_stride(call.prefix_key), unit_stride(call.prefix_value)
        width = call.value.shape[3]
        # [B, L, H, D] in memory: the model transposes heads and rows next, which then costs nothing
        self.output = tensors.empty(b, length, h, width, like=call.query, dtype=dtype).transpose(1, 2)
        self.mass_start = length - 1 if call.masses == "last" else 0
        self.masses: Tensor | None = None
        if call.masses != "none":
            self.masses = tensors.empty(
                b, h, length - self.mass_start, NUM_LABELS, like=call.query, dtype=torch.float32
            )
        self.stats = tensors.empty(b, h, length, 2, like=call.query, dtype=torch.float32) if stats else None
        maps = tuple(n for n, edit in enumerate(call.edits) if isinstance(edit, MapReplacement))
        self.fired = tables.counters(len(call.edits), maps, b * h * length, self.device).clone()
        self.row_masks = row_masks(call.groups)

    def shared(self, plan: Plan) -> dict[str, Any]:
        """Arguments that the streaming and the merging kernel share."""
        call, masks = self.call, self.row_masks
        grouped = plan is self.plan
        used = {kind for _, kind in plan.rows} | {one.rows for one in plan.maps}
        heads = tables.heads_of(call, plan)
        rows = {f"p_rows{bit}": masks.get(kind) if kind in used else None for kind, bit in plans.ROW_BIT.items()}
        return {
            "p_out": self.output,
            **rows,
            "p_heads": heads,
            "heads_b": heads.stride(0) if heads is not None and heads.shape[0] > 1 else 0,
            "p_params": tables.number_tensor(plan.numbers, self.device) if plan.numbers else None,
            "p_maps": tables.map_tensor(plan.maps, frozenset(masks), self.device) if plan.maps else None,
            "p_count": key_counts(call) if plan.slack else None,
            "p_scale": self.scale,
            "p_fired": self.fired if plan.counters else None,
            "p_masses": self.masses if grouped else None,
            "p_stats": self.stats,
            "out_b": self.output.stride(0),
            "out_h": self.output.stride(1),
            "out_l": self.output.stride(2),
            "scale_b": self.scale.stride(0) if self.scale is not None and self.scale.dim() == 2 else 0,
            "H": call.query.shape[1],
            "L": call.query.shape[2],
            "mass_start": self.mass_start,
            "D_V": call.value.shape[3],
            "BLOCK_V": power_of_two(call.value.shape[3]),
            "GROUP": call.query.shape[1] // call.key.shape[1],
            **plan.constants(frozenset(masks)),
        }

    def stream(
        self, plan: Plan, start: int, stop: int, tile: Tile, fold: bool, part: Part | None = None
    ) -> dict[str, Any]:
        """All arguments of the streaming kernel for rows start:stop over the keys of a part (all keys), unsplit."""
        call = self.call
        key, value, at, branches = part or Part(self.key, self.value)
        keys = key.shape[2]
        wanted = plan.bins or plan.scores or plan.map_bits & plans.RELEASED
        labels = call.groups.labels if call.groups is not None and wanted else None
        if labels is not None and labels.stride(1) != 1:
            labels = labels.contiguous()
        mask, kind, lowest = prepared_mask(call)
        strides = broadcast_strides(mask)
        _, _, length, d = call.query.shape
        blocks = None
        if mask is not None and not fold and strides[2]:
            blocks = summary(mask, kind, lowest, strides, (start, stop, keys), (tile.rows, tile.keys))
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., at : at + keys]
        labels = labels if labels is None else labels[:, at : at + keys]
        shared = self.shared(plan) | self.drawing(plan)
        if shared["p_places"] is not None:
            shared["p_places"] = shared["p_places"][:, at : at + keys]
        return shared | {
            "p_q": self.query,
            "p_k": key,
            "p_v": value,
            "p_labels": labels,
            "p_mask": mask,
            "p_blocks": blocks,
            "blocks_b": blocks.stride(0) if blocks is not None and blocks.shape[0] > 1 else 0,
            "blocks_h": blocks.stride(1) if blocks is not None and blocks.shape[1] > 1 else 0,
            "blocks_t": 0 if blocks is None else blocks.stride(2),
            "split_from": 0,
            "p_part_acc": None,
            "p_part_sum": None,
            "p_part_seen": None,
            **dict(zip(("q_b", "q_h", "q_l"), self.query.stride()[:3], strict=True)),
            **dict(zip(("k_b", "k_h", "k_s"), key.stride()[:3], strict=True)),
            **dict(zip(("v_b", "v_h", "v_s"), value.stride()[:3], strict=True)),
            "labels_b": 0 if labels is None else labels.stride(0),
            **dict(zip(("mask_b", "mask_h", "mask_l", "mask_s"), strides, strict=True)),
            "S": keys,
            "start": start,
            "stop": stop,
            "chunk": -(-keys // tile.keys) * tile.keys,
            "factor": call.factor * math.log2(math.e),
            "lowest": lowest,
            "D": d,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_D": power_of_two(d),
            "FOLD": fold,
            "SPLIT": False,
            "CAUSAL": mask is None and call.is_causal and length > 1,
            "MASK": kind,
            "BRANCHES": branches,
            **plan.stream_constants(),
            "PRECISION": precision(call.query),
        }

    def drawing(self, plan: Plan) -> dict[str, Any]:
        """Arguments for random and shuffled maps: places of keys and rows, where each key's weight goes."""
        call, bits = self.call, plan.map_bits
        places, rows, gather = None, None, None
        if bits & plans.DRAWN:
            places, rows = places_of(call), call.row_places().to(torch.int32).contiguous()
        if bits & plans.GATHERED:
            gather = destinations(call)
        return {
            "p_places": places,
            "p_row_places": rows,
            "p_gather": gather,
            "places_b": 0 if places is None else places.stride(0),
            "row_places_b": 0 if rows is None else rows.stride(0),
        }
