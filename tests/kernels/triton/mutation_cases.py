"""Break the kernels on purpose, one line at a time: each break must turn a comparison red. Interpreter only.

A mutation is a piece of source and what stands there instead. The kernel modules are executed again from the changed
source, so the cases below run the broken kernel; afterwards they are executed again from the true source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from device_cases import check, make, padded, relabelled

from mmfix_kernels import AttentionCall, Group, ScoreEdit
from mmfix_kernels.triton import launch

MODULES = ("blocks", "epilogue", "kernels", "merge", "launch")  # in the order of their imports


def causal(edits: str = "plain") -> AttentionCall:
    return make(20, 20, 32, edits)


def split(edits: str = "plain") -> AttentionCall:
    return make(1, 70, 32, edits, masses="all")


def masked(edits: str = "plain", hidden: float | None = None) -> AttentionCall:
    mask = padded(20, 20, 5)
    if hidden is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
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


MUTATIONS: dict[str, tuple[str, str, str, Callable[[], AttentionCall]]] = {
    "causal mask": ("kernels", "b_allowed & (b_col[None, :] <= b_row[:, None])", "b_allowed", causal),
    "keys beyond the end": ("kernels", "(b_col < end)[None, :] & b_valid", "(b_col >= 0)[None, :] & b_valid", split),
    "bool mask": ("kernels", "b_allowed & (b_mask != 0)", "b_allowed", masked),
    "additive mask": (
        "kernels", "b_allowed & (b_mask.to(tl.float32) > lowest)", "b_allowed", lambda: flattened(float("-inf")),
    ),
    "finite hidden value": (
        "kernels", "(b_mask.to(tl.float32) > lowest)", "(b_mask.to(tl.float32) >= lowest)",
        lambda: flattened(torch.finfo(torch.float32).min),
    ),
    "finite mask values": ("kernels", "b_s += tl.where(", "b_s += 0 * tl.where(", biased),
    "batch item of the mask": ("kernels", "p_mask + batch.to(tl.int64) * mask_b", "p_mask", masked),
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
    "rescaling in the merge": ("merge", "b_acc * b_old[:, None]", "b_acc", split),
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
        check(call)
