"""Compiled decoding on a cache of fixed size: one graph, no break, no recompilation, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from support.cases import CASES, NAMES, Case, active
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

import mmfix

STEPS = 7


def compiled() -> CompileConfig:
    """Whole-graph compilation, which fails on a graph break; the graph is then run as it is."""
    config = CompileConfig(fullgraph=True, backend="eager", dynamic=False, mode=None)
    config._compile_all_devices = True
    return config


# A decoding step of these is that of another method: they differ in the prompt, in the picture or in numbers.
SAME_STEP = {
    **dict.fromkeys(("agla", "causalmm-vision", "damro", "icd", "lqcd", "sid"), "vcd"),
    **dict.fromkeys(("frame-block", "mas"), "mma"),
    "causalmm-language": "causalmm", "deco": "dola", "vaf": "hgai",
}  # fmt: skip


@pytest.mark.parametrize("name", ["greedy", *(name for name in NAMES if name not in SAME_STEP)])
def test_decoding_is_one_graph(built: Any, name: str) -> None:
    if CASES.get(name, Case()).longer_prompt:
        pytest.skip("no cache of fixed size")
    model, inputs = built("llava-gqa"), vlm.one()
    method = None if name == "greedy" else active(name)
    with mmfix.mitigate(model, method) as fix:
        want = vlm.greedy(model, inputs, STEPS)
        before = fix.report().fired
        torch._dynamo.reset()
        counters.clear()
        got = vlm.greedy(model, inputs, STEPS, cache_implementation="static", compile_config=compiled())
        assert counters["stats"]["unique_graphs"] == 1, "a number that changes every step was baked into the graph"
        assert not counters["graph_break"]
        after = fix.report().fired
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    for one, fired in after.items():
        assert fired.fired == 2 * before[one].fired, "what the compiled steps did is counted too"


def test_the_compiled_call_stays_inside_the_block(built: Any) -> None:
    """Afterwards the model compiles, and decodes, as if it had never been mitigated."""
    model, inputs = built("llava-gqa"), vlm.one()
    plain = vlm.greedy(model, inputs, STEPS)
    with mmfix.mitigate(model, active("causalmm-language")):
        vlm.greedy(model, inputs, STEPS, cache_implementation="static", compile_config=compiled())
    assert "_compiled_call" not in model.__dict__
    assert "get_compiled_call" not in model.__dict__
    again = vlm.greedy(model, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))
