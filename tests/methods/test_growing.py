"""A cache that grows in place holds what transformers' own would, whatever is done to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import vlm
from transformers.cache_utils import DynamicLayer

import mmfix
from mmfix import rows
from mmfix.growing import ROOM, GrowingLayer

STEP = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 2 * ROOM)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("reorder"), st.permutations(range(3))),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("fork"), st.just(0)),
)


def random_states(seed: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, length, 4, generator=draw), torch.rand(count, 2, length, 4, generator=draw)


def act(layer: Any, step: tuple[str, Any], seed: int) -> Any:
    """One operation on a layer; what its next pass would see."""
    kind, value = step
    count = len(layer.keys)
    if kind == "add":
        return layer.update(*random_states(seed, count, value))
    if kind == "crop":
        layer.crop(-min(value, layer.get_seq_length() - 1))
    elif kind == "reorder":
        layer.reorder_cache(torch.tensor([*value, *range(3, count)]))
    elif kind == "repeat" and count < 12:
        layer.batch_repeat_interleave(value)
    elif kind == "fork":
        copy.copy(layer).update(*random_states(seed + 99, count, 2))
    return layer.keys, layer.values


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=12))
def test_it_holds_what_the_layer_of_transformers_holds(steps: list[tuple[str, Any]]) -> None:
    plain = DynamicLayer()
    plain.update(*random_states(0, 3, 5))
    growing = GrowingLayer.of(plain)
    for n, step in enumerate([*steps, ("add", 1)]):
        for found, wanted in zip(act(growing, step, n), act(plain, step, n), strict=True):
            assert torch.equal(found, wanted)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert torch.equal(growing.keys, plain.keys)
        assert torch.equal(growing.values, plain.values)


def test_a_try_copies_no_keys() -> None:
    layer = GrowingLayer.of(DynamicLayer())
    layer.update(*random_states(0, 3, 5))
    layer.update(*random_states(1, 3, 1))
    where = layer.keys.data_ptr()
    for seed in range(3):
        layer.crop(-1)
        layer.update(*random_states(seed, 3, 1))
        assert layer.keys.data_ptr() == where
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    where = layer.keys.data_ptr()
    layer.update(*random_states(4, 3, 1))
    assert layer.keys.data_ptr() == where


def test_rows_that_were_left_out_are_not_written() -> None:
    layer = GrowingLayer.of(DynamicLayer())
    layer.update(*random_states(0, 3, 5))
    layer.update(*random_states(1, 3, 1))
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    keys, values = layer.update(*random_states(2, 1, 1))
    assert keys.shape == values.shape == (1, 2, 7, 4)


def test_a_search_runs_on_it(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    kinds = set()
    forward = rows.Rows.forward

    def watched(self: rows.Rows, *args: Any, **kwargs: Any) -> Any:
        kinds.update(type(layer) for layer in self.cache.layers)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(rows.Rows, "forward", watched)
    with mmfix.mitigate(llava, mmfix.method("opera", beams=2, candidates=2)):
        llava.generate(**vlm.one(), max_new_tokens=3)
    assert kinds == {GrowingLayer}
