"""Launch the kernels for one call: choose prefill or decode, split rows that no edit touches off, split the keys."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfix_kernels.call import Attended, AttentionCall
from mmfix_kernels.edits import MapReplacement, MassMove, ScoreEdit
from mmfix_kernels.triton import plan as plans
from mmfix_kernels.triton import tensors
from mmfix_kernels.triton.arguments import Arguments, Part
from mmfix_kernels.triton.kernels import attend_kernel
from mmfix_kernels.triton.merge import merge_kernel
from mmfix_kernels.triton.plan import Plan
from mmfix_kernels.triton.tables import constant_in_graphs
from mmfix_kernels.triton.tensors import power_of_two

DECODE_ROWS = 16  # calls with at most this many query rows split the keys
MERGE_ROWS = 4  # rows of one merging program
MIN_CHUNK = 256  # keys per chunk: below this the merge costs more than the parallelism gains


@lru_cache(maxsize=8)
@constant_in_graphs
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
                first = min(first, call.groups.first[edit.rows])
    return first


class Work(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int


class Launch(Arguments):
    """The launches of one call."""

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
            "p_part_acc": tensors.empty(count, plan.accumulators, width, like=self.query, dtype=torch.float32),
            "p_part_sum": tensors.empty(count, plan.state, like=self.query, dtype=torch.float32),
            "p_part_seen": tensors.empty(count, like=self.query, dtype=torch.int32),
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
        tile = plans.decode_tile(rows, power_of_two(d), self.query.dtype == torch.float32, plan, self.major)
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
    with tensors.on_device_of(call.query):
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
