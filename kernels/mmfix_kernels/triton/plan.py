"""From edits to the compile-time shape of a kernel: key classes, bins, packed label sets, tile sizes.

A label set is a byte (bit n = label n). `classes` partitions the labels by what the mass moves do to their weights:
one accumulator each. `bins` refines it by what the gates and the mass output ask for: one scalar per row each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from mmfix_kernels.call import AttentionCall
from mmfix_kernels.closed_forms import chosen_items
from mmfix_kernels.edits import NUM_LABELS, MapReplacement, MassMove, Rows, ScoreEdit

MAX_CLASSES = 4
MAX_SCORES = 2
MAX_MOVES = 2
MAX_MAPS = 8
MAX_COUNTED = 16  # counter numbers are packed in four bits
ROW_BIT = {Rows.ALL: 1, Rows.AFTER_IMAGE: 2, Rows.LAST: 3}
SCALE_SLOT = 4
MAP_SLOT = 5  # and the next ones: one per replaced map
MAP_KIND = {"uniform": 1, "random": 2, "reversed": 3, "shuffled": 4}
STREAMED, DRAWN, TURNED, RELEASED, GATHERED = 1, 2, 4, 8, 16  # as in `maps`


class MapSlot(NamedTuple):
    """What the plan keeps of a map replacement: all but the batch rows that it selects."""

    kind: str
    normalise: bool
    seed: int
    heads: tuple[int, ...] | None
    rows: Rows


Planned = ScoreEdit | MassMove | MapSlot
Numbered = tuple[tuple[int, Planned], ...]


@dataclass(frozen=True)
class Tile:
    """Rows and keys of one program, its warps, and how many blocks of keys are in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The compile-time shape of one call.

    Args:
        classes: label sets, one accumulator each.
        bins: label sets, one mass each; empty when no mass is needed.
        scores: groups of the score edits (slots 0 and 1).
        moves: packed source, target, gate group and gate part of the mass moves (slots 2 and 3).
        seen: groups of which a row's program must know whether the row sees a key.
        rows: per slot, the row kind it tests.
        heads: per slot, the query heads, or None for all.
        counters: per slot, the number of the edit in the call.
        numbers: gain, abs_gain, bias per score edit, then share, min_mass, max_share, slack per mass move.
        slack: whether a gate counts keys.
        maps: the replaced maps.
    """

    classes: tuple[int, ...] = (255,)
    bins: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    moves: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    rows: tuple[tuple[int, Rows], ...] = ()
    heads: tuple[tuple[int, tuple[int, ...] | None], ...] = ()
    counters: tuple[tuple[int, int], ...] = ()
    numbers: tuple[float, ...] = ()
    slack: bool = False
    maps: tuple[MapSlot, ...] = ()

    @property
    def map_bits(self) -> int:
        """The constexpr MAPS."""
        bits = 0
        for one in self.maps:
            if one.kind == "shuffled":
                bits |= GATHERED
                continue
            bits |= STREAMED | {"uniform": 0, "random": DRAWN, "reversed": TURNED}[one.kind]
            bits |= 0 if one.normalise or one.kind == "reversed" else RELEASED
        return bits

    @property
    def accumulators(self) -> int:
        """Accumulators that a program keeps."""
        return len(self.classes) + bool(self.map_bits & STREAMED)

    @property
    def state(self) -> int:
        """Floats per row beside the accumulators that a chunk of the keys leaves behind."""
        return 24 if self.map_bits & STREAMED else 12

    def constants(self, row_masks: frozenset[Rows]) -> dict[str, int]:
        """The constexpr arguments that both kernels share; `row_masks` are the row kinds that have a mask."""
        return {
            "N_CLASSES": len(self.classes),
            "CLASSES": pack(self.classes),
            "N_BINS": len(self.bins),
            "N_SCORES": len(self.scores),
            "N_MOVES": len(self.moves),
            "MOVE0": self.moves[0] if self.moves else 0,
            "MOVE1": self.moves[1] if len(self.moves) > 1 else 0,
            "ROWS": sum(ROW_BIT[kind] << 4 * slot for slot, kind in self.rows if kind in row_masks),
            "COUNTERS": sum(number << 4 * slot for slot, number in self.counters),
            "MAPS": self.map_bits,
            "N_MAPS": len(self.maps),
        }

    def stream_constants(self) -> dict[str, int]:
        """Further constexpr arguments of the streaming kernel."""
        return {
            "BINS": pack(self.bins),
            "SCORES": pack(self.scores),
            "N_SEEN": len(self.seen),
            "SEEN": pack(self.seen),
        }


def pack(sets: Iterable[int]) -> int:
    """Bytes into one integer, the first in the lowest byte."""
    return sum(labels << 8 * n for n, labels in enumerate(sets))


def partition(groups: Iterable[int]) -> tuple[int, ...]:
    """The coarsest partition of the labels in which every group is a union of parts."""
    wanted = tuple(groups)
    parts: dict[tuple[bool, ...], int] = {}
    for label in range(NUM_LABELS):
        signature = tuple(bool(group >> label & 1) for group in wanted)
        parts[signature] = parts.get(signature, 0) | 1 << label
    return tuple(parts.values())


def numbered(call: AttentionCall) -> Numbered:
    """The edits on keys with their number in the call, without the batch rows that they select."""
    out: list[tuple[int, Planned]] = []
    for n, edit in enumerate(call.edits):
        if isinstance(edit, MapReplacement):
            out.append((n, MapSlot(edit.kind, edit.normalise, edit.seed, edit.heads, edit.rows)))
        elif isinstance(edit, (ScoreEdit, MassMove)):
            out.append((n, edit if edit.batch is None else replace(edit, batch=None)))
    return tuple(out)


_AGREED: dict[tuple[int, int, int, tuple[int, ...]], bool] = {}


def labels_agree(call: AttentionCall) -> bool:
    """Whether the branches that share a prefix label its keys alike; on a GPU read once for each tensor of labels."""
    if call.prefix_key is None or call.groups is None:
        return True
    labels, count, shared = call.groups.labels, call.prefix_key.shape[0], call.prefix_key.shape[2]
    known = (labels.data_ptr(), shared, labels.shape[0], labels.stride())
    if known not in _AGREED or labels.device.type == "cpu":
        if len(_AGREED) > 512:
            _AGREED.clear()
        before = labels[:, :shared].reshape(count, -1, shared)
        _AGREED[known] = bool((before == before[:, :1]).all())
    return _AGREED[known]


def conflict(call: AttentionCall) -> str:
    """Why the edits cannot be kept apart in one pass; "" when they can."""
    if torch.compiler.is_compiling():  # in a graph no tensor is read; the edits are those of the prompt
        return "" if call.prefix_key is None else "a shared prefix in a compiled graph"
    if not labels_agree(call):
        return "branches label the prefix that they share differently"
    count = call.query.shape[0]
    taken = [False] * count
    for _, edit in call.weight_edits:
        chosen = chosen_items(edit.batch, count)
        if any(a and b for a, b in zip(taken, chosen, strict=True)):
            return "an edit of weights after their map was replaced"
        if isinstance(edit, MapReplacement):
            if edit.kind == "shuffled" and (call.mask is not None or call.is_causal):
                return "a shuffled map under a mask: weights move to hidden keys"
            taken = [a or b for a, b in zip(taken, chosen, strict=True)]
    return ""


@lru_cache(maxsize=256)
def make_plan(edits: Numbered, all_masses: bool, scale_number: int | None) -> Plan | str:
    """The plan of these edits, or why no kernel serves them.

    Args:
        edits: see `numbered`.
        all_masses: whether the mass of every label is an output.
        scale_number: number of the head scale that the epilogue applies.
    """
    scores = [(n, e) for n, e in edits if isinstance(e, ScoreEdit)]
    moves = [(n, e) for n, e in edits if isinstance(e, MassMove)]
    maps = [(n, e) for n, e in edits if isinstance(e, MapSlot)]
    if len(maps) > MAX_MAPS:
        return f"more than {MAX_MAPS} replaced maps in one call"
    shuffled = any(e.kind == "shuffled" for _, e in maps)
    if shuffled and (scores or moves or len(maps) > 1):
        return "a shuffled map together with other edits on keys"
    if len(scores) > MAX_SCORES or len(moves) > MAX_MOVES:
        return f"more than {MAX_SCORES} score edits or {MAX_MOVES} mass moves in one call"
    classes = partition(int(group) for _, m in moves for group in (m.source, m.target))
    extra = bool(maps) and not shuffled
    if len(classes) + extra > MAX_CLASSES:
        more = " and a replaced map" if extra else ""
        return f"{len(classes)} key classes{more}; the kernel keeps at most {MAX_CLASSES} accumulators"
    gates = [m.gate for _, m in moves if m.gate is not None]
    bins: tuple[int, ...] = ()
    if all_masses:
        bins = tuple(1 << label for label in range(NUM_LABELS))
    elif moves:
        gated = [int(group) for gate in gates for group in (gate.group, gate.part)]
        bins = partition([*classes, *gated])
    slots = [(slot, n, e) for slot, (n, e) in enumerate(scores)] + [(2 + k, n, e) for k, (n, e) in enumerate(moves)]
    counters = [(slot, n) for slot, n, _ in slots] + [(MAP_SLOT + k, n) for k, (n, _) in enumerate(maps)]
    if scale_number is not None:
        counters.append((SCALE_SLOT, scale_number))
    if any(n >= MAX_COUNTED for _, n in counters):
        return f"more than {MAX_COUNTED} edits in one call"
    return Plan(
        classes=classes,
        bins=bins,
        scores=tuple(int(e.group) for _, e in scores),
        moves=tuple(_pack_move(m) for _, m in moves),
        seen=tuple(int(e.group) for _, e in scores) + tuple(_part(m) for _, m in moves if gates),
        rows=tuple((slot, e.rows) for slot, _, e in slots),
        heads=tuple((slot, e.heads) for slot, _, e in slots),
        counters=tuple(counters),
        numbers=_numbers([e for _, e in scores], [m for _, m in moves]),
        slack=any(gate.slack != 0 for gate in gates),
        maps=tuple(e for _, e in maps),
    )


def _part(move: MassMove) -> int:
    return 0 if move.gate is None else int(move.gate.part)


def _pack_move(move: MassMove) -> int:
    gate = 0 if move.gate is None else int(move.gate.group)
    return pack((int(move.source), int(move.target), gate, _part(move)))


def _numbers(scores: list[ScoreEdit], moves: list[MassMove]) -> tuple[float, ...]:
    out: list[float] = []
    for edit in scores:
        out += [edit.gain, edit.abs_gain, edit.bias]
    out += [0.0] * (3 * (MAX_SCORES - len(scores)))
    for move in moves:
        gate = move.gate
        out += [move.share, *((0.0, 1.0, 0.0) if gate is None else (gate.min_mass, gate.max_share, gate.slack))]
    return tuple(out)


def prefill_tile(width: int, plan: Plan, wide_scores: bool, masked: bool = False, major: int = 9) -> Tile:
    """Tile of the prefill kernel: as many rows as keep their state in registers.

    Args:
        width: head width (power of two).
        plan: how many accumulators and which maps.
        wide_scores: float32 inputs.
        masked: whether a mask tensor is read, which takes registers.
        major: compute capability (8, 9, 10); their compilers keep different things in registers.
    """
    if wide_scores:
        return Tile(32, 32, 4, 1) if width >= 128 else Tile(64, 32, 4, 1)
    if width >= 256:
        return Tile(64, 32, 8, 2) if plan.accumulators <= 2 else Tile(32, 32, 8, 2)
    if width < 128:
        return Tile(128, 64, 4, 3) if plan.accumulators == 1 else Tile(64, 32, 4, 2)
    if plan.accumulators == 1 and masked and plan.scores and major > 9:
        return Tile(64, 32, 8, 2)
    if plan.accumulators == 1:
        return Tile(128, 32, 8, 3) if masked or major < 9 else Tile(128, 64, 8, 3)
    if plan.accumulators > 3 or (plan.map_bits and major < 9) or (plan.moves and masked and major >= 9):
        return Tile(32, 32, 8, 2)
    return Tile(64, 32, 8, 1 if plan.moves and major > 9 else 2)  # 64 keys at once would spill


def decode_tile(rows: int, width: int, wide_scores: bool, plan: Plan, major: int = 9) -> Tile:
    """Tile of the decode kernel for the folded row count; the rest as for :func:`prefill_tile`."""
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if width >= 256:
        tall = min(tall, 32)
    keys = 32 if width >= 128 or wide_scores else 64
    if width >= 128 and plan.map_bits & RELEASED and major > 9:  # 32 would spill
        keys = 16
    stages = 2 if plan.scores and plan.moves else 3  # three blocks in flight would spill where both are there
    return Tile(tall, keys, 4, 1 if wide_scores else stages)
