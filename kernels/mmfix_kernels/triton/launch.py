"""Launch the kernels for one call: choose prefill or decode, split rows that no edit touches off, allocate outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfix_kernels.call import Attended, AttentionCall
from mmfix_kernels.edits import NUM_LABELS, MapReplacement, MassMove, ScoreEdit
from mmfix_kernels.triton import plan as plans
from mmfix_kernels.triton import tables
from mmfix_kernels.triton.kernels import attend_kernel
from mmfix_kernels.triton.masks import summary
from mmfix_kernels.triton.merge import merge_kernel
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

DECODE_ROWS = 16  # calls with at most this many query rows split the keys
MERGE_ROWS = 4  # rows of one merging program
MIN_CHUNK = 256  # keys per chunk: below this the merge costs more than the parallelism gains


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
def processors(device: torch.device) -> int:
    """How many programs run at once; a CPU (the interpreter) gets enough to split the keys."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 16


@lru_cache(maxsize=8)
def capability(device: torch.device) -> int:
    """Major compute capability; 9 where there is no CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 9
    return int(torch.cuda.get_device_capability(device)[0])


def chunk_of(keys: int, programs: int, device: torch.device, block: int) -> int:
    """Keys per chunk: about two programs per multiprocessor, never less than MIN_CHUNK keys, whole blocks."""
    wanted = max(1, 2 * processors(device) // max(1, programs))
    per = max(MIN_CHUNK, -(-keys // wanted))
    return -(-per // block) * block


def first_edited_row(call: AttentionCall) -> int:
    """Rows before this one are plain attention (with head scales)."""
    length = call.query.shape[2]
    first = {"none": length, "last": length - 1, "all": 0}[call.masses]
    if call.groups is not None:
        for edit in call.edits:
            if isinstance(edit, (ScoreEdit, MassMove, MapReplacement)):
                first = min(first, call.groups.first[edit.rows])
    return first


class Work(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int


class Part(NamedTuple):
    """Neighbouring keys that one launch reads: where they stand among all keys, and how many batch rows share them."""

    key: Tensor
    value: Tensor
    start: int = 0
    branches: int = 1


class Launch:
    """Tensors of one call, shared by its launches."""

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
        self.output = empty(b, length, h, width, like=call.query, dtype=dtype).transpose(1, 2)
        self.mass_start = length - 1 if call.masses == "last" else 0
        self.masses: Tensor | None = None
        if call.masses != "none":
            self.masses = empty(b, h, length - self.mass_start, NUM_LABELS, like=call.query, dtype=torch.float32)
        self.stats = empty(b, h, length, 2, like=call.query, dtype=torch.float32) if stats else None
        maps = tuple(n for n, edit in enumerate(call.edits) if isinstance(edit, MapReplacement))
        self.fired = tables.counters(len(call.edits), maps, b * h * length, self.device).clone()
        self.row_masks = row_masks(call.groups)

    def shared(self, plan: Plan) -> dict[str, Any]:
        """Arguments that the streaming and the merging kernel share."""
        call, masks = self.call, self.row_masks
        grouped = plan is self.plan
        used = {kind for _, kind in plan.rows} | {one.rows for one in plan.maps}
        heads = tables.head_tensor(tables.selected(call, plan), *call.query.shape[:2], self.device)
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

    def prefill(self, plan: Plan, start: int, stop: int) -> list[Work]:
        """Rows start:stop, a tile of rows of one head per program."""
        b, h, _, d = self.call.query.shape
        wide, masked = self.query.dtype == torch.float32, self.call.mask is not None
        tile = plans.prefill_tile(power_of_two(d), plan, wide, masked, self.major)
        grid = (-(-(stop - start) // tile.rows), b * h, 1)
        return [Work(attend_kernel, grid, self.stream(plan, start, stop, tile, fold=False), tile.warps, tile.stages)]

    def decode(self, plan: Plan) -> list[Work]:
        """All rows, keys split over programs, the heads of one key head folded into the row axis.

        Branches fold into the row axis too where they share a prefix: its keys are read once for all of them.
        """
        parts = [Part(self.key, self.value)]
        if self.prefix is not None:
            shared = self.call.query.shape[0] // self.prefix[0].shape[0]
            before = Part(*self.prefix, start=0, branches=shared)
            parts = [before, Part(self.key, self.value, start=self.prefix[0].shape[2])]
            parts = [part for part in parts if part.key.shape[2]]
        works = [self.streaming(plan, part) for part in parts]
        splits = sum(work.grid[2] for work in works)
        if splits == 1 and parts[0].branches == 1:
            return works
        b, h, length, width = self.output.shape
        h_kv = self.key.shape[1]
        rows = h // h_kv * length
        count = splits * b * h_kv * rows
        state = {
            "p_part_acc": empty(count, plan.accumulators, width, like=self.query, dtype=torch.float32),
            "p_part_sum": empty(count, plan.state, like=self.query, dtype=torch.float32),
            "p_part_seen": empty(count, like=self.query, dtype=torch.int32),
        }
        from_split = 0
        for work in works:
            work.arguments.update(state, SPLIT=True, split_from=from_split)
            from_split += work.grid[2]
        merging = self.shared(plan) | state | {"splits": splits, "BLOCK_M": MERGE_ROWS}
        return [*works, Work(merge_kernel, (-(-rows // MERGE_ROWS), b * h_kv, 1), merging, 4, 1)]

    def streaming(self, plan: Plan, part: Part) -> Work:
        """The launch of a decode step over the keys of one part."""
        _, h, length, d = self.call.query.shape
        items, h_kv, keys, _ = part.key.shape
        rows = h // h_kv * length * part.branches
        tile = plans.decode_tile(rows, power_of_two(d), self.query.dtype == torch.float32)
        tiles = -(-rows // tile.rows)
        chunk = chunk_of(keys, items * h_kv * tiles, self.device, tile.keys)
        arguments = self.stream(plan, 0, length, tile, fold=True, part=part) | {"chunk": chunk}
        return Work(attend_kernel, (tiles, items * h_kv, -(-keys // chunk)), arguments, tile.warps, tile.stages)


def prepare(
    call: AttentionCall, plan: Plan, stats: bool = False, dtype: torch.dtype | None = None, major: int | None = None
) -> tuple[Launch, list[Work]]:
    """The outputs of one call (by default in the query's dtype) and the launches that fill them.

    `major` is the compute capability that tiles are chosen for, by default the device's.
    """
    if call.prefix_key is not None and call.query.shape[2] > DECODE_ROWS:  # once per prompt: repeat what is shared
        key, value = call.whole(call.prefix_key, call.key), call.whole(call.prefix_value, call.value)
        call = replace(call, key=key, value=value, prefix_key=None, prefix_value=None)
    launch = Launch(call, plan, stats, dtype or call.query.dtype, major)
    length = call.query.shape[2]
    causal = call.mask is None and call.is_causal and length > 1
    first = first_edited_row(call)
    bare = plans.make_plan((), False, dict(plan.counters).get(plans.SCALE_SLOT))
    assert isinstance(bare, Plan)
    if length <= DECODE_ROWS and not causal and not plan.map_bits & plans.GATHERED:
        return launch, launch.decode(bare if first >= length else plan)
    if first < DECODE_ROWS:  # a launch of its own would cost more than the few rows
        first = 0
    work = launch.prefill(bare, 0, first) if first else []
    return launch, work + (launch.prefill(plan, first, length) if first < length else [])


def attend(
    call: AttentionCall, plan: Plan, stats: bool = False, dtype: torch.dtype | None = None
) -> tuple[Attended, Tensor | None]:
    """Serve one call; with `stats` also Float32[B, H, L, 2]: LSE and largest weight of each row."""
    # A model may lie on several devices; Triton launches on the current one.
    with torch.cuda.device_of(call.query):  # type: ignore[no-untyped-call]
        launch, work = prepare(call, plan, stats, dtype)
        for one in work:
            one.kernel[one.grid](**one.arguments, num_warps=one.warps, num_stages=one.stages)
    output = further_scales(call, launch.output, launch.fired)
    return Attended(output, launch.masses, launch.fired, "triton"), launch.stats


def further_scales(call: AttentionCall, output: Tensor, fired: Tensor) -> Tensor:
    """Head scales after the first, which the epilogue applied."""
    for n, edit in call.head_scales[1:]:
        scale = edit.scale.to(output.device).expand(output.shape[:2])
        output = output * scale.to(output.dtype)[:, :, None, None]
        fired[n, 0] = (scale != 1).sum() * output.shape[2]
        fired[n, 1] = scale.numel() * output.shape[2]
    return output


def empty(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Unwritten memory; tests replace this by one that fills it with NaN."""
    return torch.empty(*shape, dtype=dtype, device=like.device)
