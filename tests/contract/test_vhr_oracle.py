"""VHR against an oracle of two explicit branches (tests/support/vhr_oracle.py). There is no released code to record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from support.vhr_oracle import Oracle, vhr

import mmfix
from mmfix.methods import VHR
from mmfix.methods.vhr import default_layers
from mmfix_kernels import HeadScale

LAYERS = (1, 3, 4)  # the paper's, in proportion to five layers
FOLLOW = (17, 42, 8)


def run(model: Any, inputs: dict[str, Any], follow: tuple[int, ...] = FOLLOW) -> list[torch.Tensor]:
    """Logits [B, T, V] of the prefill and of one decode step per token of `follow`."""
    mask = inputs["attention_mask"]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        steps = [out.logits]
        for n, token in enumerate(follow):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(
                input_ids=torch.full((len(mask), 1), token), attention_mask=mask, use_cache=True,
                past_key_values=out.past_key_values, position_ids=mask.sum(-1, keepdim=True) - 1,
            )  # fmt: skip
            steps.append(out.logits)
            assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + n + 1
    return steps


def chosen(fix: mmfix.Mitigation, row: int) -> dict[int, set[int]]:
    """layer → scaled heads of one row, as the engine froze them."""
    found = {}
    for state in fix._session.layers:
        scales = [edit.scale for edit in state.edits if isinstance(edit, HeadScale)]
        assert len(scales) <= 1
        if scales:
            found[state.layer] = set((scales[0][row] != 1).nonzero().flatten().tolist())
    return found


def agree(steps: list[torch.Tensor], oracle: Oracle, row: int = 0) -> None:
    length = oracle.logits[0].shape[0]
    torch.testing.assert_close(steps[0][row, -length:], oracle.logits[0], atol=1e-4, rtol=0)
    for got, want in zip(steps[1:], oracle.logits[1:], strict=True):
        torch.testing.assert_close(got[row, -1], want, atol=1e-4, rtol=0)


def padded(rows: list[list[int]], pictures: torch.Tensor | None) -> dict[str, Any]:
    """A left-padded batch with the positions that generate() would give."""
    inputs = vlm.batch(rows, pictures)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def test_the_oracle_is_the_plain_model_when_nothing_is_scaled(model: Any) -> None:
    ids = vlm.tokens(3, "image", 6)
    agree(run(model, padded([ids], vlm.picture())), vhr(model, ids, vlm.picture(), (), FOLLOW))


@pytest.mark.parametrize("alpha", [2.0, 0.5])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_logits_and_heads_of_prefill_and_three_steps(
    model: Any, alpha: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFIX_BACKEND", backend)
    ids = vlm.tokens(3, "image", 6)
    oracle = vhr(model, ids, vlm.picture(), LAYERS, FOLLOW, alpha)
    with mmfix.mitigate(model, VHR(alpha=alpha)) as fix:
        steps = run(model, padded([ids], vlm.picture()))
    assert chosen(fix, 0) == oracle.chosen
    agree(steps, oracle)
    plain = run(model, padded([ids], vlm.picture()))
    assert all((a - b).abs().max() > 0.05 for a, b in zip(steps, plain, strict=True))


def test_both_parts_of_the_rule_matter_here(model: Any) -> None:
    """The oracle itself can tell the outlier rule, and the scaling of the text-only branch, from their absence."""
    differ_outlier = differ_text = False
    for seed in range(8):
        ids = vlm.tokens(3, "image", 6, seed=seed)
        full = vhr(model, ids, vlm.picture(seed), LAYERS)
        differ_outlier |= full.chosen != vhr(model, ids, vlm.picture(seed), LAYERS, drop_outliers=False).chosen
        differ_text |= full.chosen != vhr(model, ids, vlm.picture(seed), LAYERS, scale_text=False).chosen
    assert differ_outlier
    assert differ_text


@pytest.mark.parametrize("drop_outliers", [True, False])
def test_eight_prompts(model: Any, drop_outliers: bool) -> None:
    with mmfix.mitigate(model, VHR(drop_outliers=drop_outliers)) as fix:
        for seed in range(8):
            ids = vlm.tokens(2 + seed, "image", 9 - seed, seed=seed)
            oracle = vhr(model, ids, vlm.picture(seed), LAYERS, drop_outliers=drop_outliers)
            agree(run(model, padded([ids], vlm.picture(seed)), ()), oracle)
            assert chosen(fix, 0) == oracle.chosen, seed


def test_the_text_only_branch_may_stay_unscaled(model: Any) -> None:
    """VHR-4: both readings of the paper are there."""
    with mmfix.mitigate(model, VHR(scale_text_only=False)) as fix:
        for seed in range(8):
            ids = vlm.tokens(3, "image", 6, seed=seed)
            run(model, padded([ids], vlm.picture(seed)), ())
            assert chosen(fix, 0) == vhr(model, ids, vlm.picture(seed), LAYERS, scale_text=False).chosen, seed


def test_batch_with_left_padding_and_ragged_text(model: Any) -> None:
    rows = [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(7, "image", 11, seed=2), vlm.tokens(1, "image", 1, seed=3)]
    pictures = vlm.picture(0, 3)
    with mmfix.mitigate(model, "vhr") as fix:
        steps = run(model, padded(rows, pictures))
    for n, ids in enumerate(rows):
        oracle = vhr(model, ids, pictures[n : n + 1], LAYERS, FOLLOW)
        assert chosen(fix, n) == oracle.chosen
        agree(steps, oracle, n)
    assert len({str(chosen(fix, n)) for n in range(3)}) > 1, "the rows chose the same heads: the test shows nothing"


def test_two_images_in_one_prompt(model: Any) -> None:
    ids, pictures = vlm.tokens(2, "image", 3, "image", 5), vlm.picture(0, 2)
    with mmfix.mitigate(model, "vhr") as fix:
        steps = run(model, padded([ids], pictures))
    oracle = vhr(model, ids, pictures, LAYERS, FOLLOW)
    assert chosen(fix, 0) == oracle.chosen
    agree(steps, oracle)


def test_a_row_without_an_image_stays_plain(model: Any) -> None:
    rows = [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(14, seed=2)]
    with mmfix.mitigate(model, "vhr") as fix:
        steps = run(model, padded(rows, vlm.picture()))
    assert not any(chosen(fix, 1).values())
    agree(steps, vhr(model, rows[0], vlm.picture(), LAYERS, FOLLOW), 0)
    agree(steps, vhr(model, rows[1], None, (), FOLLOW), 1)


def test_heads_are_frozen_at_the_prompt(model: Any) -> None:
    ids = vlm.tokens(3, "image", 6)
    with mmfix.mitigate(model, "vhr") as fix:
        run(model, padded([ids], vlm.picture()), ())
        before = chosen(fix, 0)
        run(model, padded([ids], vlm.picture()))
        assert chosen(fix, 0) == before
    assert fix.report().extra_prefills == 2  # one per prompt, none per token
    assert fix.report().fired["vhr"].share == pytest.approx(0.5)


def test_alpha_one_is_the_identity(model: Any) -> None:
    inputs = padded([vlm.tokens(3, "image", 6)], vlm.picture())
    plain = run(model, inputs)
    with mmfix.mitigate(model, "vhr", alpha=1.0) as fix:
        steps = run(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(steps, plain, strict=True))
    assert fix.report().extra_prefills == 0


def test_chosen_layers(model: Any) -> None:
    """A single layer, by either end of its number, scales nothing else."""
    ids = vlm.tokens(3, "image", 6)
    for layers, meant in (((2,), (2,)), ((-1,), (4,)), ((0, 4), (0, 4))):
        with mmfix.mitigate(model, VHR(layers=layers)) as fix:
            steps = run(model, padded([ids], vlm.picture()))
        oracle = vhr(model, ids, vlm.picture(), meant, FOLLOW)
        assert chosen(fix, 0) == oracle.chosen
        agree(steps, oracle)


def test_default_layers_are_the_papers() -> None:
    assert default_layers(32) == (1, *range(18, 32))
    assert default_layers(vlm.LAYERS) == LAYERS
    assert default_layers(1) == (0,)
