"""Break the kernels on purpose, one line at a time: each break must turn a comparison red. Interpreter only.

A mutation is a piece of source and what stands there instead. The kernel modules are executed again from the changed
source, so the cases below run the broken kernel; afterwards they are executed again from the true source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_cases import make, relabelled
from map_cases import KINDS, checked, shaped
from mutating import Mutate, broken  # noqa: F401
from prefix_cases import branched
from support.eager import additive, padded

from mmfix_kernels import AttentionCall, Group, Label, MapReplacement, MassMove, Rows, ScoreEdit
from mmfix_kernels.triton import launch

MIXED = "mix(mix(b_word, b_head), b_place)"
RAISE = MassMove(source=Group.TEXT, target=Group.IMAGE, share=1.0)


def causal(edits: str = "plain") -> AttentionCall:
    return make(20, 20, 32, edits)


def split(edits: str = "plain") -> AttentionCall:
    return make(1, 70, 32, edits, masses="all")


def masked(edits: str = "plain", hidden: float | None = None) -> AttentionCall:
    mask = padded(20, 20, 5)
    if hidden is not None:
        mask = additive(mask, hidden)
    return make(20, 20, 32, edits, batch=2, mask=mask, is_causal=False)


def grouped() -> AttentionCall:
    return make(18, 18, 32, heads=4, kv_heads=2)


def long() -> AttentionCall:
    return make(70, 70, 32)


def biased() -> AttentionCall:
    return make(1, 40, 32, mask=torch.linspace(-1, 1, 40)[None, None, None], is_causal=False)


def flattened(hidden: float) -> AttentionCall:
    """An additive mask and an edit that sets scores to zero: a hidden key must stay hidden all the same."""
    return replace(masked(hidden=hidden), edits=[ScoreEdit(group=Group.IMAGE, gain=0.0)])


def short() -> AttentionCall:
    """Few enough rows that the edited last one shares a launch with the others."""
    return make(12, 12, 32, "pai")


def little_image() -> AttentionCall:
    """Few image keys, so that most rows give the image less than the gate's least mass."""
    call = causal("var")
    labels = torch.zeros(1, 20, dtype=torch.int8)
    labels[:, 0], labels[:, 5], labels[:, 8], labels[:, 6] = 2, 1, 1, 3
    return relabelled(call, labels)


def no_image() -> AttentionCall:
    """Keys of which some rows see no image sink, so that the gate must stay closed there."""
    call = causal("var")
    labels = torch.ones(1, 20, dtype=torch.int8)
    labels[:, 0], labels[:, 12] = 2, 3
    return relabelled(call, labels)


def mapped(kind: str, shape: str = "causal", **options: Any) -> AttentionCall:
    """A replaced map; the batch rows of padded shapes have different ones."""
    if shape.startswith("padded"):
        options.setdefault("batch", torch.tensor([False, True]))
    return shaped(shape, MapReplacement(**{**KINDS[kind], **options}), masses="all")


def two_maps() -> AttentionCall:
    edits = [MapReplacement(kind="uniform", heads=(0,)), MapReplacement(kind="random", heads=(1,))]
    return shaped("causal", *edits, masses="all")


def turned_moves() -> AttentionCall:
    """Moves that raise weights above the largest one before them, then a reversed map."""
    return replace(mapped("reversed as released"), edits=[RAISE, MapReplacement(kind="reversed", normalise=False)])


def branching(edits: str = "plain") -> AttentionCall:
    return branched(2, 2, 33, 5, edits)


def some_items() -> AttentionCall:
    call = make(20, 20, 32, "pai", batch=2)
    return replace(call, edits=[replace(edit, batch=torch.tensor([True, False])) for edit in call.edits])


def shuffled() -> AttentionCall:
    return shaped("full", MapReplacement(kind="shuffled", seed=5))


def windowed() -> AttentionCall:
    """A sliding window over blocks of keys that are hidden, mixed, and free of the mask."""
    at = torch.arange(150)
    near = (at[:, None] - at[None, :]).abs() < 70
    return make(150, 150, 16, mask=near[None, None], is_causal=False)


def apart() -> AttentionCall:
    """Enough rows before the first edited one for a launch of their own."""
    return make(40, 40, 32, "all", first=20)


def one_group(label: int) -> AttentionCall:
    """All keys of one group: a move has no source or no target."""
    call = replace(causal(), edits=[RAISE])
    return relabelled(call, torch.full((1, 20), label, dtype=torch.int8))


def two_prompts(edits: str, keys: int = 20) -> AttentionCall:
    return make(keys, keys, 32, edits, batch=2)


def last_masses() -> AttentionCall:
    return make(20, 20, 32, "var", masses="last")


def hidden_prefix() -> AttentionCall:
    mask = torch.ones(4, 1, 1, 38, dtype=torch.bool)
    mask[1, :, :, 3:30] = mask[2, :, :, 35:] = False
    return branched(2, 2, 33, 5, mask=mask)


def staggered() -> AttentionCall:
    """The image ends earlier in one prompt than in the other."""
    call = two_prompts("two moves")
    assert call.groups is not None
    rows = dict(call.groups.rows)
    rows[Rows.AFTER_IMAGE] = torch.arange(20) >= torch.tensor([[10], [15]])
    return replace(call, groups=replace(call.groups, rows=rows))


def seen_early() -> AttentionCall:
    """The only image sink stands in the first part of a split stream."""
    labels = torch.ones(1, 70, dtype=torch.int8)
    labels[:, 1], labels[:, 5], labels[:, 50:] = int(Label.IMAGE_SINK), int(Label.TEXT_SINK), int(Label.TEXT)
    call = relabelled(split("var"), labels)
    return replace(call, edits=[replace(edit, gate=replace(edit.gate, min_mass=0.0)) for edit in call.edits])


def third_class() -> AttentionCall:
    """Four classes in a split stream."""
    return make(1, 70, 32, "two moves", masses="all")


MUTATIONS: dict[str, tuple[str, str, str, Callable[[], AttentionCall]]] = {
    "causal mask": ("kernels", "b_allowed & (b_col[None, :] <= b_row[:, None])", "b_allowed", causal),
    "keys beyond the end": ("kernels", "(b_col < end)[None, :] & b_valid", "(b_col >= 0)[None, :] & b_valid", split),
    "bool mask": ("kernels", "b_allowed & (b_mask != 0)", "b_allowed", masked),
    "a tile that the mask hides in part": ("masks", "some * (2 - rest)", "2 * some * (1 - rest)", windowed),
    "a tile that the mask touches": ("masks", "some * (2 - rest)", "some * 2", windowed),
    "mask of the right tile": ("kernels", "tile * blocks_t + first", "0 * tile + first", windowed),
    "additive mask": (
        "kernels", "b_allowed & (b_mask.to(tl.float32) > lowest)", "b_allowed", lambda: flattened(float("-inf")),
    ),
    "finite hidden value": (
        "kernels", "(b_mask.to(tl.float32) > lowest)", "(b_mask.to(tl.float32) >= lowest)",
        lambda: flattened(torch.finfo(torch.float32).min),
    ),
    "finite mask values": ("kernels", "b_bias = tl.where(", "b_bias = 0 * tl.where(", biased),
    "batch item of the mask": ("kernels", "b_at += b_item.to(tl.int64) * mask_b", "b_at += 0", masked),
    "grouped heads": ("kernels", "kv_head = head if FOLD else head // GROUP", "kv_head = head * 0", grouped),
    "score edit": ("blocks", "b_edited, b_s)", "b_s, b_s)", lambda: causal("pai")),
    "magnitude in a score edit": ("blocks", "abs_gain * tl.abs(b_s)", "abs_gain * b_s", lambda: causal("pai")),
    "group of a score edit": (
        "blocks", "b_touched[:, None] & b_in[None, :]", "b_touched[:, None]", lambda: causal("pai"),
    ),
    "rows of a score edit": ("blocks", "b_touched[:, None] & b_in[None, :]", "b_in[None, :]", short),
    "classes apart": ("blocks", "tl.where(b_in[None, :], b_s, NEG_INF)", "b_s", lambda: causal("var")),
    "rescaling in the stream": ("blocks", "b_acc = b_acc * b_alpha[:, None]", "b_acc = b_acc * 1.0", long),
    "visibility": ("blocks", "b_allowed & b_in[None, :]", "b_in[None, :] & (b_allowed | True)", no_image),
    "the gate": ("epilogue", "if GATE != 0:", "if GATE > 255:", lambda: causal("var")),
    "least mass of the gate": ("epilogue", "(b_group >= tl.load(p_params + 7 + 4 * N)) & ", "", little_image),
    "largest share of the gate": (
        "epilogue", "b_active & (mass(b_w, PART) <=", "b_active | (mass(b_w, PART) <=", lambda: causal("var"),
    ),
    "a part that no row sees": ("epilogue", "(((b_seen >> SEEN) & 1) != 0)", "(b_seen == b_seen)", no_image),
    "slack of the gate": (
        "epilogue", "b_limit = b_group + tl", "b_limit = b_group + 0 * tl", lambda: causal("release"),
    ),
    "heads of an edit": ("epilogue", "(b_heads >> SLOT) & 1", "1", lambda: causal("all")),
    "rows of a mass move": (
        "epilogue", "(b_rows >> ((ROWS >> (4 * SLOT)) & 15)) & ", "", lambda: causal("two moves"),
    ),
    "second move": ("epilogue", "if N_MOVES > 1:", "if N_MOVES > 2:", lambda: causal("two moves")),
    "head scale": ("epilogue", "b_out = b_out * b_scale[:, None]", "b_out = b_out * 1.0", lambda: causal("all")),
    "batch rows of a map": ("rows", "p_heads + b_item * heads_b", "p_heads", lambda: mapped("uniform", "padded")),
    "heads of a map": ("rows", "heads_b + b_head", "heads_b + 0 * b_head", lambda: mapped("random", heads=(1,))),
    "kind of a map": ("maps", "b_map - 1", "b_map * 0", lambda: two_maps()),
    "seed of a map": ("maps", "b_heads, b_rows, 2).to", "b_heads, b_rows, 0).to", lambda: mapped("random")),
    "row in the generator": ("maps", MIXED, "mix(b_word, b_head)", lambda: mapped("random")),
    "head in the generator": ("maps", MIXED, "mix(b_word, b_place)", lambda: mapped("random")),
    "padding in the generator": ("maps", "!= PADDING).to", "!= 9).to", lambda: mapped("random", "padded")),
    "what a random map hides": ("kernels", "tl.where(b_allowed, b_r, 0.0)", "b_r", lambda: mapped("random")),
    "all keys of a released map": (
        "maps", "(b_norm != 0, b_rsum, b_total)", "(b_norm != 9, b_rsum, b_total)",
        lambda: mapped("uniform as released"),
    ),
    "padding of a released map": (
        "kernels", "(b_label != PADDING)[None, :], b_r", "(b_label != 9)[None, :], b_r",
        lambda: mapped("uniform as released", "padded"),
    ),
    "largest weight": ("maps", "b_peak[:, None] * b_racc", "b_racc", lambda: mapped("reversed")),
    "largest weight after moves": (
        "epilogue", "b_peak = b_c0 * b_inv * of_class(b_f, CLASSES, 0)", "b_peak = b_inv", turned_moves,
    ),
    "division of a reversed map": ("maps", "/ b_by[:, None]", "", lambda: mapped("reversed", "decode")),
    "a row that cannot be reversed": (
        "maps", "tl.where(b_equal[:, None], b_out, b_turned)", "b_turned", lambda: mapped("reversed"),
    ),
    "masses of a replaced map": ("epilogue", "b_w = replaced_masses", "_ = replaced_masses", lambda: mapped("random")),
    "where a shuffled weight goes": ("kernels", "b_v_at = (b_from_key - low)", "b_v_at = (b_col - low)", shuffled),
    "replaced maps in the merge": ("state", "b_racc += ", "b_racc = ", lambda: mapped("random", "decode")),
    "branch of a row": ("rows", "batch * BRANCHES + b_index // (GROUP * L)", "batch * BRANCHES", branching),
    "prompt of a branch": ("kernels", "item = batch * BRANCHES", "item = batch", lambda: branching("pai")),
    "keys of the prefix and after it": ("kernels", "split = split_from +", "split = 0 * split_from +", branching),
    "batch rows of an edit": ("rows", "p_heads + b_item * heads_b", "p_heads", some_items),
    "rescaling in the merge": ("state", "b_acc * b_old[:, None]", "b_acc", split),
    "scale of the scores": ("kernels", "b_s = b_s * factor", "b_s = b_s * 1.0", causal),
    "rows of this launch": ("rows", "b_valid = b_row < stop", "b_valid = b_row < L", apart),
    "keys before the edge": ("kernels", "start + tile * BLOCK_M + 1)", "start + (tile + 1) * BLOCK_M)", long),
    "gain of a score edit": ("blocks", "gain * b_s + abs_gain", "b_s + abs_gain", lambda: causal("all")),
    "bias of a score edit": ("blocks", "bias * LOG2E", "bias", lambda: causal("all")),
    "second score edit": ("kernels", "b_touch1, gain1", "b_touch1 & (b_row < 0), gain1", lambda: causal("all")),
    "scores that an edit may see": ("kernels", "b_s = tl.where(b_allowed, b_s, NEG_INF)", "b_s = b_s + 0.0", causal),
    "labels of the batch row": ("kernels", "item.to(tl.int64) * labels_b + b_from_key", "b_from_key",
                                lambda: two_prompts("var")),
    "row masks of the batch row": ("rows", "b_at = b_item * L + b_row", "b_at = b_item * 0 + b_row",
                                   lambda: staggered()),
    "a bin of its own": ("blocks", "tl.where(((b_bit & ((BINS >> (8 * k)) & 255)) != 0)[None, :], b_p, 0.0)", "b_p",
                         lambda: causal("var")),
    "a source to move": ("epilogue", "& (b_source > 0)", "", lambda: one_group(int(Label.IMAGE))),
    "a target to move to": ("epilogue", "& (b_target > 0)", "", lambda: one_group(int(Label.TEXT))),
    "source of a move": ("epilogue", "1.0 - b_share[:, None]", "1.0 - 0.0 * b_share[:, None]", lambda: causal("var")),
    "target of a move": ("epilogue", "1.0 + b_gain[:, None]", "1.0 + 0.0 * b_gain[:, None]", lambda: causal("var")),
    "common scale of the classes": ("epilogue", "b_c1 = tl.math.exp2(b_m1 - b_safe)", "b_c1 = tl.math.exp2(b_m1 * 0.0)",
                                    lambda: causal("var")),
    "rows whose masses are wanted": ("epilogue", "b_valid & (b_row >= mass_start)", "b_valid & (b_row > mass_start)",
                                     last_masses),
    "changed rows": ("epilogue", "tl.sum(b_active.to(tl.int64), axis=0))", "tl.sum(b_looked.to(tl.int64), axis=0))",
                     lambda: causal("var")),
    "third class in the merge": ("merge", "if N_CLASSES > 2:", "if N_CLASSES > 8:", third_class),
    "groups seen by any part": ("merge", "b_seen = b_seen | tl.load", "b_seen = tl.load", seen_early),
    "masses of a map in the merge": ("state", "b_rbins += ", "b_rbins = ", lambda: mapped("random", "decode")),
    "sum of a map in the merge": ("state", "b_rsum += ", "b_rsum = ", lambda: mapped("random", "decode")),
    "keys of a map in the merge": ("state", "b_count += ", "b_count = ", lambda: mapped("reversed", "decode")),
    "all keys of a map in the merge": ("state", "b_total += ", "b_total = ",
                                       lambda: mapped("random as released", "decode")),
    "mask of the keys after a prefix": ("arguments", "mask = mask[..., at : at + keys]", "mask = mask[..., :keys]",
                                        hidden_prefix),
    "labels of the keys after a prefix": ("arguments", "labels[:, at : at + keys]", "labels[:, :keys]",
                                          lambda: branching("pai")),
    "places of the keys after a prefix": (
        "arguments", 'shared["p_places"][:, at : at + keys]', 'shared["p_places"][:, :keys]',
        lambda: branched(2, 2, 33, 5, [MapReplacement(kind="random", seed=3)]),
    ),
    "sums in the merge": (
        "merge", "b_in = in_columns((CLASSES >> 8) & 255)", "b_in = in_columns(CLASSES & 255)", lambda: split("var"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name: str, broken: Mutate, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module, old, new, build = MUTATIONS[name]
    call = build()
    broken(module, old, new)
    monkeypatch.setattr(launch, "MIN_CHUNK", 32)
    with pytest.raises(AssertionError):
        checked(call)
