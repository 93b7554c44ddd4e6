"""Every family under every decoding mode of ``generate()``: the cache, and how it is kept, changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import Tiny

import mmfix

SOME = ("llava", "qwen2.5-vl", "gemma3", "blip-2")
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(range(90, 100))}


def generated(model: Any, inputs: dict[str, Any], method: str, **options: Any) -> list[list[int]]:
    params = {"mma": {"until": "prompt"}, "causalmm": {"epsilon": 1e-6}}.get(method, {})
    with torch.no_grad(), mmfix.mitigate(model, method, **params):
        found: list[list[int]] = model.generate(**inputs, **OPTIONS, **options)[:, -4:].tolist()
    return found


def test_caches_and_guesses(tiny: Tiny, model: Any) -> None:
    """Branches of every kind: without a cache, in a cache of fixed size, with guessed tokens checked."""
    both, one = tiny.inputs(padded=True), tiny.inputs()
    greedy = generated(model, both, "causalmm")
    assert generated(model, both, "causalmm", use_cache=False) == greedy
    assert generated(model, both, "causalmm", cache_implementation="static", disable_compile=True) == greedy
    assert generated(model, one, "causalmm", prompt_lookup_num_tokens=2) == greedy[:1]


@pytest.mark.parametrize("method", ["causalmm", "vhr", "mma"])
def test_beams(tiny: Tiny, model: Any, method: str) -> None:
    """Beams reorder the cache's rows; without a cache every step is a prompt that grew and changed places."""
    if method != "causalmm" and tiny.name not in SOME:
        pytest.skip("what a prompt freezes is tested in fewer families")
    inputs = tiny.inputs(padded=True)
    cached = generated(model, inputs, method, num_beams=3)
    assert generated(model, inputs, method, num_beams=3, use_cache=False) == cached
