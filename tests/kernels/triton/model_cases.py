"""Whole tiny models through the kernels: the same tokens and logits as by SDPA and by the reference.

One method of every kind that the kernels serve, on the tiny models of the contract suite; run like device_cases.py.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import quicken

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.vlm import MODELS, build, greedy, one
from transformers.generation import CompileConfig

import mmfix
import mmfix.prefix
from mmfix.method import Method
from mmfix.methods import HGAI, MAS, MMA, PAI, SPIN, VAF, VAR, VHR, CausalMMLanguage
from mmfix_kernels import AttentionCall
from mmfix_kernels.attention import observed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    quicken()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BACKENDS = ("triton", "sdpa", "reference")
SINKS = VAR(sink_dims=(0, 1), tau=1.5, min_image_mass=0.0, max_sink_share=1.0)
# By what each asks of the kernels; the branches of the last one read the start of the prompt once.
METHODS: dict[str, Method] = {
    "mass move": SINKS,
    "score edits": VAF(image_gain=2.0),
    "head scale": VHR(),
    "opened pairs": MMA(until="prompt"),
    "closed pairs": MAS(until="prompt"),
    "score edit of the last row, and a branch": PAI(beta=1e-9),
    "random map": CausalMMLanguage(language="random", language_rows="after_image", epsilon=1e-9),
}
TOLD = ("mass move", "random map")  # group masses are compared too
# Every kind on grouped key heads; where each head has its own, those with most in the kernel (programs take long here).
CASES = [*(("llava-gqa", kind) for kind in METHODS), *(("llava", kind) for kind in TOLD)]


@lru_cache(maxsize=2)
def model_of(name: str) -> Any:
    """Each tiny model once; tests do not change it."""
    return build(name).to(DEVICE)


def prompt(after: int = 4) -> dict[str, Any]:
    return {name: tensor.to(DEVICE) for name, tensor in one(after=after).items()}


def close(got: Any, want: Any) -> None:
    """The same tokens, and logits within 1e-4."""
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_models_are_those_of_the_contract_suite() -> None:
    assert {name for name, _ in CASES} == set(MODELS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_backend_gives_the_same_answer(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmfix.prefix, "LEAST", 3)  # also a short prompt is worth sharing
    model, inputs, method = model_of(name), prompt(), METHODS[kind]
    monkeypatch.delenv("MMFIX_BACKEND", raising=False)
    plain = greedy(model, inputs, steps=2)
    answers, reports, shared = {}, {}, []
    for backend in BACKENDS:
        monkeypatch.setenv("MMFIX_BACKEND", backend)
        calls: list[AttentionCall] = []
        with mmfix.mitigate(model, method, telemetry=kind in TOLD) as fix, observed(calls.append):
            answers[backend] = greedy(model, inputs, steps=2)
            reports[backend] = fix.report()
        assert {layer.backend for layer in reports[backend].layers} == {backend}
        shared.append(sum(call.prefix_key is not None for call in calls))
    assert all(count > 0 for count in shared) if kind == "random map" else not any(shared)
    fired = reports["triton"].fired[method.info.name]
    assert fired.share, "the edit must act for the comparison to say something"
    assert max(float((a - b).abs().max()) for a, b in zip(answers["triton"].logits, plain.logits, strict=True)) > 1e-2
    for backend in BACKENDS[1:]:
        close(answers["triton"], answers[backend])
        assert fired == reports[backend].fired[method.info.name]
        assert reports["triton"].masses == pytest.approx(reports[backend].masses, abs=1e-5)


@pytest.mark.parametrize("method", [HGAI(layers=(1, 2)), SPIN(keep=0.7)], ids=lambda method: method.info.name)
def test_a_method_that_compares_heads_is_refused_by_name(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the kernel holds one head; where no backend is forced, another one serves the layer."""
    model, inputs = model_of("llava-gqa"), prompt()
    monkeypatch.setenv("MMFIX_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"compares heads.*unset MMFIX_BACKEND"), mmfix.mitigate(model, method):
        greedy(model, inputs, steps=1)
    monkeypatch.delenv("MMFIX_BACKEND")
    with mmfix.mitigate(model, method) as fix:
        greedy(model, inputs, steps=1)
        assert {layer.backend for layer in fix.report().layers} == {"sdpa"}


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("kind", ["mass move", "head scale", "random map"])
def test_a_fixed_cache_and_cuda_graphs_give_the_same_answer(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding compiled whole, its graph captured on the third step and replayed from then on."""
    model, inputs, method = model_of("llava-gqa"), prompt(), METHODS[kind]
    config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    monkeypatch.setenv("MMFIX_BACKEND", backend)
    torch._dynamo.reset()
    with mmfix.mitigate(model, method) as fix:
        want = greedy(model, inputs, steps=8)
        before = fix.report().fired[method.info.name]
        got = greedy(model, inputs, steps=8, cache_implementation="static", compile_config=config)
        after = fix.report().fired[method.info.name]
        assert {layer.backend for layer in fix.report().layers} == {backend}
    close(got, want)
    assert after.fired == 2 * before.fired, "what the captured steps did is counted too"
