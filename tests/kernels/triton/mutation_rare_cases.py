"""Calls that no other case makes: the whole kernels pass them, kernels without one guard do not. Interpreter only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from device_cases import make, relabelled
from map_cases import checked
from mutating import Mutate, broken  # noqa: F401
from mutation_cases import RAISE, causal

from mmfix_kernels import AttentionCall, Group, Label, MapReplacement, MassGate, MassMove, Rows, ScoreEdit
from mmfix_kernels.triton import launch


def loud() -> AttentionCall:
    """Scores of hundreds: a class may be larger than another by more than a float can hold. Nothing is moved."""
    call = make(40, 40, 32, "two moves")
    return replace(call, query=call.query * 100, edits=[replace(edit, share=0.0) for edit in call.edits])


def surrounded(shape: str, width: int = 32) -> AttentionCall:
    """Tensors cut out of larger ones that hold NaN: what is read beyond the edges of a tile shows."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        b, h, length, d = tensor.shape
        whole = torch.full((b, h, length + 64, d + 16), float("nan"))
        whole[:, :, :length, :d] = tensor
        return whole[:, :, :length, :d]

    call = make(1, 70, width, "var") if shape == "decode" else make(20, 20, width)
    return replace(call, query=cut(call.query), key=cut(call.key), value=cut(call.value))


def no_mass() -> AttentionCall:
    """Rows see image keys, but an earlier edit leaves the image no mass: the gate stays closed."""
    labels = torch.zeros(1, 20, dtype=torch.int8)
    labels[:, 0], labels[:, 1], labels[:, 3] = int(Label.TEXT_SINK), int(Label.SYSTEM), int(Label.IMAGE_SINK)
    gate = MassGate(group=Group.IMAGE, min_mass=0.0, part=Group.IMAGE_SINK, max_share=1.0)
    hide = ScoreEdit(group=Group.IMAGE, bias=float("-inf"))
    move = MassMove(source=Group.TEXT_SINK, target=Group.SYSTEM, share=0.5, gate=gate)
    return relabelled(replace(causal(), edits=[hide, move]), labels)


def raised_third() -> AttentionCall:
    """A move raises the weights of the third class above all others, then the map is reversed."""
    labels = torch.ones(1, 20, dtype=torch.int8)
    labels[:, 2], labels[:, 5] = int(Label.TEXT), int(Label.SYSTEM)
    move = MassMove(source=Group.IMAGE, target=Group.SYSTEM, share=1.0)
    return relabelled(replace(causal(), edits=[move, MapReplacement(kind="reversed", normalise=False)]), labels)


def one_key() -> AttentionCall:
    """A shuffled map with nothing to shuffle changes no row."""
    return replace(make(1, 1, 32, is_causal=False), edits=[MapReplacement(kind="shuffled", seed=5)])


def map_of_last_rows() -> AttentionCall:
    return replace(make(3, 3, 32), edits=[MapReplacement(kind="random", rows=Rows.LAST)])


CALLS: dict[str, Callable[[], AttentionCall]] = {
    "loud": loud,
    "surrounded": lambda: surrounded("causal"),
    "surrounded, narrow": lambda: surrounded("causal", 20),
    "surrounded, decode": lambda: surrounded("decode", 20),
    "no mass": no_mass,
    "no share": lambda: replace(causal(), edits=[replace(RAISE, share=0.0)]),
    "raised third": raised_third,
    "one key": one_key,
    "map of last rows": map_of_last_rows,
}
MUTATIONS: dict[str, tuple[str, str, str, Callable[[], AttentionCall]]] = {
    "largest of the classes": ("epilogue", "b_max = tl.maximum(b_max, b_m1)", "b_max = b_max", loud),
    "largest of three classes": ("epilogue", "b_max = tl.maximum(b_max, b_m2)", "b_max = b_max", loud),
    "largest of four classes": ("epilogue", "b_max = tl.maximum(b_max, b_m3)", "b_max = b_max", loud),
    "keys that do not exist": ("kernels", "mask=b_dim_in & b_col_in", "mask=b_dim_in", CALLS["surrounded"]),
    "dimensions that do not exist": (
        "kernels", "mask=b_dim_in & b_col_in", "mask=b_col_in", CALLS["surrounded, narrow"],
    ),
    "dimensions of whole blocks": (
        "kernels", "elif FULL_DIM:", "elif FULL_DIM or b_off.shape[0] > 0:", CALLS["surrounded, decode"],
    ),
    "dimensions of a query": (
        "kernels", "mask=b_valid[:, None] & (b_d < D)[None, :]", "mask=b_valid[:, None]", CALLS["surrounded, narrow"],
    ),
    "a gate without mass": ("epilogue", " & (b_group > 0)", "", no_mass),
    "a move of nothing": ("epilogue", "b_active & (b_share > 0)", "b_active", CALLS["no share"]),
    "largest weight of the third class": (
        "epilogue", "tl.maximum(b_peak, b_c2 * b_inv * of_class(b_f, CLASSES, 2))", "b_peak", raised_third,
    ),
    "a shuffle that moves nothing": ("epilogue", "(b_kind > 0) & (b_count > 0) & (b_z > 0)", "b_kind > 0", one_key),
    "rows of a map": ("maps", "((b_rows & (b_rows >> b_bit)) & 1) != 0", "(b_rows & 1) != 0", map_of_last_rows),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_whole_kernels_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MIN_CHUNK", 32)
    checked(CALLS[name]())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name: str, broken: Mutate, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module, old, new, build = MUTATIONS[name]
    call = build()
    broken(module, old, new)
    monkeypatch.setattr(launch, "MIN_CHUNK", 32)
    with pytest.raises(AssertionError):
        checked(call)
