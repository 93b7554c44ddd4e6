"""Parity of VAR with the paper's released code on a tiny LLaVA (recorded outputs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import expanded_ids, load_golden_llava

import mmfix
from mmfix.methods import VAR
from mmfix_kernels import Label


@pytest.fixture(scope="module")
def golden() -> Any:
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden" / "var"
    if not folder.is_dir():
        pytest.skip("reference data (../shared) is not here")
    return load_golden_llava(folder)


def method_of(meta: dict[str, Any], **changes: Any) -> VAR:
    hp = meta["hp"]
    params: dict[str, Any] = {
        "sink_dims": tuple(meta["dim_sink"]), "tau": hp["tau"], "min_image_mass": hp["summ"],
        "max_sink_share": hp["rho"], "move": round(1 - hp["p"], 6), "skip_last_layer": False,
    }  # fmt: skip
    return VAR(**{**params, **changes})


def run(model: Any, outputs: dict[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """Logits of the prefill and of three decode steps, fed the recorded tokens."""
    ids = expanded_ids(outputs[f"{prefix}.input_ids"], 16)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=outputs[f"{prefix}.pixel_values"], use_cache=True)
        logits = [out.logits]
        for token in outputs[f"{prefix}.tokens"][0]:
            out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return logits


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_logits_of_prefill_and_three_steps(
    golden: Any, variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, outputs, meta = golden
    monkeypatch.setenv("MMFIX_BACKEND", backend)
    with mmfix.mitigate(model, method_of(meta, variant=variant)) as fix:
        logits = run(model, outputs, "var")
    for step, got in enumerate(logits):
        torch.testing.assert_close(got, outputs[f"var.logits_step{step}"], atol=1e-4, rtol=0)
    assert 0 < fix.report().fired["var"].share < 1


def test_without_a_method_the_plain_outputs_come_back(golden: Any) -> None:
    model, outputs, _ = golden
    with mmfix.mitigate(model, None):
        logits = run(model, outputs, "base")
    for step, got in enumerate(logits):
        torch.testing.assert_close(got, outputs[f"base.logits_step{step}"], atol=1e-4, rtol=0)


def test_sink_indices_of_every_layer(golden: Any) -> None:
    model, outputs, meta = golden
    with mmfix.mitigate(model, method_of(meta)) as fix:
        run(model, outputs, "var")
        for layer, state in enumerate(fix._session.layers):
            sunk = (state.labels[0] == Label.TEXT_SINK) | (state.labels[0] == Label.IMAGE_SINK)
            assert sunk.nonzero().flatten().tolist() == sorted(outputs[f"var.sink_idx_layer{layer}"].tolist())


def test_edited_maps(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity matrix as values makes attention return its own map, after the edit."""
    from mmfix.layers import LayerState
    from mmfix_kernels import AttentionCall, grouped_attention

    model, outputs, meta = golden
    recorded: dict[tuple[int, int], torch.Tensor] = {}
    steps: dict[int, int] = {}
    attend = LayerState.attend

    def spy(state: LayerState, inputs: dict[str, Any], window: int | None) -> Any:
        s_len = inputs["key"].shape[2]
        step = steps[state.layer] = steps.get(state.layer, -1) + 1
        identity = torch.eye(s_len).expand(*inputs["key"].shape[:2], s_len, s_len)
        call = AttentionCall(**{**inputs, "value": identity}, groups=state._groups(s_len), edits=state.edits)
        recorded[step, state.layer] = grouped_attention(call, "sdpa").output
        return attend(state, inputs, window)

    monkeypatch.setattr(LayerState, "attend", spy)
    with mmfix.mitigate(model, method_of(meta)):
        run(model, outputs, "var")
    assert len(recorded) == 4 * 5
    for (step, layer), got in recorded.items():
        torch.testing.assert_close(got, outputs[f"var.attn_step{step}_layer{layer}"], atol=1e-4, rtol=0)
