"""Parity of CausalMM with the paper's released code on a tiny LLaVA (recorded outputs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.golden import expanded_ids, load_golden_llava

import mmfix
from mmfix.methods import CausalMMVision
from mmfix_kernels import MapReplacement
from mmfix_kernels.maps import replace_rows

KINDS = {"random": "random", "uniform": "uniform", "reversed": "reversed", "shuffled": "shuffle"}


@pytest.fixture(scope="module")
def folder() -> Path:
    found = Path(__file__).resolve().parents[3] / "shared" / "golden" / "causalmm"
    if not found.is_dir():
        pytest.skip("reference data (../shared) is not here")
    return found


@pytest.fixture(scope="module")
def golden(folder: Path) -> Any:
    return load_golden_llava(folder)


def method(kind: str, gamma: float = 1.0, epsilon: float = 1e-9) -> CausalMMVision:
    return CausalMMVision(vision=kind, gamma=gamma, epsilon=epsilon, variant="release")


@pytest.fixture(autouse=True)
def recorded_map(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random maps are fed from the record: the release's generator is not ours to reproduce."""
    import mmfix.vision

    ours = mmfix.vision.release_map

    def fed(edit: MapReplacement, attention: torch.Tensor) -> torch.Tensor:
        recorded = golden[1][f"{KINDS[edit.kind]}.edited_attn"]
        if edit.kind in ("uniform", "reversed"):
            torch.testing.assert_close(ours(edit, attention), recorded, atol=1e-5, rtol=0)
        return recorded.expand_as(attention)

    monkeypatch.setattr(mmfix.vision, "release_map", fed)


def run(model: Any, outputs: dict[str, torch.Tensor], method: Any, steps: int = 1) -> tuple[list[torch.Tensor], Any]:
    """Raw logits of all rows (prefill, then decode steps fed the factual argmax), and the mixed ones."""
    ids = expanded_ids(outputs["input_ids"], 16)
    raw, mixed = [], []
    with mmfix.mitigate(model, method) as fix, torch.no_grad():
        session = fix._session
        finish = session.finish

        def spy(output: Any) -> Any:
            raw.append(output.logits.clone())
            return finish(output)

        session.finish = spy
        out = model(input_ids=ids, pixel_values=outputs["pixel_values"], use_cache=True)
        mixed.append(out.logits)
        token = outputs["logits_prefill"][:, -1].argmax(-1, keepdim=True)
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            mixed.append(out.logits)
    return raw, mixed


@pytest.mark.parametrize("kind", KINDS)
def test_factual_and_counterfactual_logits(golden: Any, kind: str) -> None:
    model, outputs, _ = golden
    raw, _ = run(model, outputs, method(kind))
    name = KINDS[kind]
    torch.testing.assert_close(raw[0][0], outputs["logits_prefill"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(raw[0][1], outputs[f"{name}.cf_logits_prefill"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(raw[1][0], outputs["logits_decode1"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(raw[1][1], outputs[f"{name}.cf_logits_decode1_own_cache"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "epsilon"), [(0.5, 0.1), (1.0, 0.1), (1.0, 0.6)])
def test_combined_logits(golden: Any, kind: str, gamma: float, epsilon: float) -> None:
    model, outputs, _ = golden
    _, mixed = run(model, outputs, method(kind, gamma, epsilon), steps=0)
    expected = outputs[f"{KINDS[kind]}.combined_g{gamma}_e{epsilon}"]
    got = mixed[0][:, -1].masked_fill(mixed[0][:, -1].isneginf(), -1e30)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_counterfactual_features(golden: Any) -> None:
    model, outputs, _ = golden
    seen: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run(model, outputs, method("reversed"), steps=0)
    finally:
        hook.remove()
    torch.testing.assert_close(seen[0], outputs["vit_features"], atol=1e-4, rtol=0)


def test_language_level_maps(folder: Path) -> None:
    recorded = load_file(folder / "llm_level_functions.safetensors")
    edits = {
        "reverse": MapReplacement(kind="reversed", normalise=False),
        "reverse_and_normalize": MapReplacement(kind="reversed"),
        "uniform": MapReplacement(kind="uniform", normalise=False),
    }
    for phase in ("prefill", "decode"):
        weights = recorded[f"attn_{phase}"]
        b, _, rows, keys = weights.shape
        labels = torch.zeros(b, keys, dtype=torch.int8)
        allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        for name, edit in edits.items():
            got = replace_rows(edit, weights, allowed, labels, torch.arange(keys - rows, keys).expand(b, rows))
            expected = recorded[f"{phase}.{name}"]
            assert not got.isnan().any()
            numbers = ~expected.isnan()  # the release has NaN where a row has one key
            torch.testing.assert_close(got[numbers], expected[numbers], atol=1e-6, rtol=0)
