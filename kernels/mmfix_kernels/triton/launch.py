"""Launch the kernels for one call: choose prefill or decode, split rows that no edit touches off, allocate outputs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfix_kernels.call import Attended, AttentionCall
from mmfix_kernels.edits import NUM_LABELS, KeyGroups, MapReplacement, MassMove, Rows, ScoreEdit, head_mask
from mmfix_kernels.maps import permutation
from mmfix_kernels.triton import plan as plans
from mmfix_kernels.triton import tables
from mmfix_kernels.triton.kernels import attend_kernel
from mmfix_kernels.triton.maps import places_kernel
from mmfix_kernels.triton.masks import summary
from mmfix_kernels.triton.merge import merge_kernel
from mmfix_kernels.triton.plan import Plan, Tile

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
                first = min(first, call.groups.first[getattr(edit, "rows", Rows.ALL)])
    return first


class Work(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int


class Launch:
    """Tensors of one call, shared by its launches."""

    def __init__(self, call: AttentionCall, plan: Plan, stats: bool, dtype: torch.dtype) -> None:
        b, h, length, _ = call.query.shape
        self.call, self.plan = call, plan
        self.device = call.query.device
        self.scale, _ = head_scale(call)
        self.query, self.key, self.value = (unit_stride(t) for t in (call.query, call.key, call.value))
        width = call.value.shape[3]
        # [B, L, H, D] in memory: the model transposes heads and rows next, which then costs nothing
        self.output = empty(b, length, h, width, like=call.query, dtype=dtype).transpose(1, 2)
        self.mass_start = length - 1 if call.masses == "last" else 0
        self.masses: Tensor | None = None
        if call.masses != "none":
            self.masses = empty(b, h, length - self.mass_start, NUM_LABELS, like=call.query, dtype=torch.float32)
        self.stats = empty(b, h, length, 2, like=call.query, dtype=torch.float32) if stats else None
        self.fired = torch.zeros(len(call.edits), 2, dtype=torch.int64, device=self.device)
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

    def stream(self, plan: Plan, start: int, stop: int, tile: Tile, fold: bool) -> dict[str, Any]:
        """All arguments of the streaming kernel for rows start:stop, unsplit."""
        call = self.call
        wanted = plan.bins or plan.scores or plan.map_bits & plans.RELEASED
        labels = call.groups.labels if call.groups is not None and wanted else None
        if labels is not None and labels.stride(1) != 1:
            labels = labels.contiguous()
        mask, kind, lowest = prepared_mask(call)
        strides = broadcast_strides(mask)
        _, _, length, d = call.query.shape
        blocks = None
        if mask is not None and not fold and strides[2]:
            blocks = summary(mask, kind, lowest, strides, (start, stop, call.key.shape[2]), (tile.rows, tile.keys))
        shared = self.shared(plan) | self.drawing(plan)
        return shared | {
            "p_q": self.query,
            "p_k": self.key,
            "p_v": self.value,
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
            **dict(zip(("k_b", "k_h", "k_s"), self.key.stride()[:3], strict=True)),
            **dict(zip(("v_b", "v_h", "v_s"), self.value.stride()[:3], strict=True)),
            "labels_b": 0 if labels is None else labels.stride(0),
            **dict(zip(("mask_b", "mask_h", "mask_l", "mask_s"), strides, strict=True)),
            "S": call.key.shape[2],
            "start": start,
            "stop": stop,
            "chunk": -(-call.key.shape[2] // tile.keys) * tile.keys,
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
            "BRANCHES": 1,
            **plan.stream_constants(),
            "PRECISION": precision(call.query),
        }

    def drawing(self, plan: Plan) -> dict[str, Any]:
        """Arguments for random and shuffled maps: places of keys and rows, where each key's weight goes."""
        call, bits = self.call, plan.map_bits
        places, rows, gather = None, None, None
        if bits & plans.DRAWN:
            places = places_of(call)
            offset = call.key.shape[2] - call.query.shape[2]
            if call.groups is not None and call.groups.offset is not None:
                offset = call.groups.offset
            rows = places[:, offset : offset + call.query.shape[2]]
        if bits & plans.GATHERED:
            gather = destinations(call)
        return {
            "p_places": places,
            "p_row_places": rows,
            "p_gather": gather,
            "places_b": 0 if places is None else places.stride(0),
        }

    def prefill(self, plan: Plan, start: int, stop: int) -> list[Work]:
        """Rows start:stop, a tile of rows of one head per program."""
        b, h, _, d = self.call.query.shape
        tile = plans.prefill_tile(power_of_two(d), plan.accumulators, self.call.query.dtype == torch.float32)
        grid = (-(-(stop - start) // tile.rows), b * h, 1)
        return [Work(attend_kernel, grid, self.stream(plan, start, stop, tile, fold=False), tile.warps, tile.stages)]

    def decode(self, plan: Plan) -> list[Work]:
        """All rows, keys split over programs, the heads of one key head folded into the row axis."""
        call = self.call
        b, h, length, d = call.query.shape
        h_kv, keys = call.key.shape[1:3]
        rows = h // h_kv * length
        tile = plans.decode_tile(rows, power_of_two(d), call.query.dtype == torch.float32)
        tiles = -(-rows // tile.rows)
        chunk = chunk_of(keys, b * h_kv * tiles, self.device, tile.keys)
        splits = -(-keys // chunk)
        arguments = self.stream(plan, 0, length, tile, fold=True)
        work = Work(attend_kernel, (tiles, b * h_kv, splits), arguments, tile.warps, tile.stages)
        if splits == 1:
            return [work]
        parts, width = splits * b * h_kv * rows, call.value.shape[3]
        state = {
            "p_part_acc": empty(parts, plan.accumulators, width, like=call.query, dtype=torch.float32),
            "p_part_sum": empty(parts, plan.state, like=call.query, dtype=torch.float32),
            "p_part_seen": empty(parts, like=call.query, dtype=torch.int32),
        }
        arguments |= {"chunk": chunk, "SPLIT": True, **state}
        merging = self.shared(plan) | state | {"splits": splits, "BLOCK_M": MERGE_ROWS}
        return [work, Work(merge_kernel, (-(-rows // MERGE_ROWS), b * h_kv, 1), merging, 4, 1)]


def prepare(
    call: AttentionCall, plan: Plan, stats: bool = False, dtype: torch.dtype | None = None
) -> tuple[Launch, list[Work]]:
    """The outputs of one call (by default in the query's dtype) and the launches that fill them."""
    launch = Launch(call, plan, stats, dtype or call.query.dtype)
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
    return places


def destinations(call: AttentionCall) -> Tensor:
    """Int32[B, H, S]: the key that takes each key's weight under the call's shuffled map."""
    assert call.groups is not None
    (edit,) = (edit for edit in call.edits if isinstance(edit, MapReplacement))
    b, h, keys = call.query.shape[0], call.query.shape[1], call.key.shape[2]
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
