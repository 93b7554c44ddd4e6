"""Break the kernels on purpose, one line at a time: each break must turn a comparison red. Interpreter only.

A mutation is a piece of source and what stands there instead. The kernel modules are executed again from the changed
source, so the cases below run the broken kernel; afterwards they are executed again from the true source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import make, relabelled
from map_cases import KINDS, checked, shaped
from prefix_cases import branched
from support.eager import additive, padded

from mmfix_kernels import AttentionCall, Group, MapReplacement, MassMove, ScoreEdit
from mmfix_kernels.triton import launch

MODULES = (
    "blocks",
    "maps",
    "masks",
    "rows",
    "state",
    "epilogue",
    "kernels",
    "merge",
    "tensors",
    "launch",
)  # fmt: skip  (in the order of their imports)


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
    "sums in the merge": (
        "merge", "b_in = in_columns((CLASSES >> 8) & 255)", "b_in = in_columns(CLASSES & 255)", lambda: split("var"),
    ),
}  # fmt: skip


def execute(folder: Path, changed: dict[str, str]) -> None:
    """Run the kernel modules again, in place, from their source or from `changed` source (written to `folder`)."""
    for name in MODULES:
        module = importlib.import_module(f"mmfix_kernels.triton.{name}")
        assert module.__file__ is not None
        path = Path(module.__file__)
        source = changed.get(name, path.read_text())
        if changed:  # the interpreter reads a function's source from the file that its code names
            path = folder / f"{name}.py"
            path.write_text(source)
        exec(compile(source, str(path), "exec"), module.__dict__)


@pytest.fixture
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, str, str], None]]:
    def mutate(name: str, old: str, new: str) -> None:
        module = importlib.import_module(f"mmfix_kernels.triton.{name}")
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        assert old in source, "the mutation has no place: the kernel has changed"
        execute(tmp_path, {name: source.replace(old, new)})

    yield mutate
    execute(tmp_path, {})


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(
    name: str, broken: Callable[[str, str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, old, new, build = MUTATIONS[name]
    call = build()
    broken(module, old, new)
    monkeypatch.setattr(launch, "MIN_CHUNK", 32)
    with pytest.raises(AssertionError):
        checked(call)
