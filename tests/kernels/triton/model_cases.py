"""A whole tiny model through the kernels: the same tokens and logits as by SDPA; run like device_cases.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from quick import quicken

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.vlm import build, greedy, one

import mmfix
from mmfix.methods import VAR

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def test_the_same_tokens_as_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava-gqa").to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in one().items()}
    method = VAR(sink_dims=(0, 1), tau=1.5, min_image_mass=0.0, max_sink_share=1.0)
    answers = {}
    for backend in ("triton", "sdpa"):
        monkeypatch.setenv("MMFIX_BACKEND", backend)
        with mmfix.mitigate(model, method) as fix:
            answers[backend] = greedy(model, inputs, steps=2)
            report = fix.report()
        assert {layer.backend for layer in report.layers} == {backend}
        assert report.fired["var"].share > 0, "the edit must act for the comparison to say something"
    got, want = answers["triton"], answers["sdpa"]
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
