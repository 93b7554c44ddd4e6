"""Batch rows equal single runs, padding changes nothing, and no state passes from one prompt to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from support.cases import NAMES, TOGETHER, active

import mmfix
from mmfix import Method

# Ragged rows: (tokens, pictures).
ROWS = [
    (vlm.tokens(3, "image", 6, seed=1), vlm.picture(1)),
    (vlm.tokens(1, "image", 1, seed=2), vlm.picture(2)),
    (vlm.tokens(8, "image", 4, "image", 3, seed=3), vlm.picture(3, 2)),
    (vlm.tokens(11, seed=4), None),
    (vlm.tokens("image", 7, seed=5), vlm.picture(5)),
]
METHODS: list[list[Method]] = [*([active(name)] for name in NAMES), [active(name) for name in TOGETHER]]
STEPS = 3  # a prompt, its first new token, and one more
by_method = pytest.mark.parametrize("methods", METHODS, ids=["+".join(m.info.name for m in row) for row in METHODS])
quiet = pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")


def together(rows: list[Any], width: int = 0, side: str = "left") -> dict[str, Any]:
    pictures = [pictures for _, pictures in rows if pictures is not None]
    return vlm.batch([ids for ids, _ in rows], torch.cat(pictures) if pictures else None, width, side)


@quiet
@by_method
@pytest.mark.parametrize("telemetry", [False, True])
def test_batch_rows_equal_single_runs(model: Any, methods: list[Method], telemetry: bool) -> None:
    with mmfix.mitigate(model, methods, telemetry=telemetry) as fix:
        batch = vlm.greedy(model, together(ROWS), STEPS)
        masses = fix.masses()
    for n, row in enumerate(ROWS):
        with mmfix.mitigate(model, methods, telemetry=telemetry) as fix:
            single = vlm.greedy(model, together([row]), STEPS)
            alone = fix.masses()
        for step, (a, b) in enumerate(zip(batch.logits, single.logits, strict=True)):
            torch.testing.assert_close(a[n], b[0], atol=1e-4, rtol=0, msg=f"row {n} step {step}")
        if telemetry:
            assert masses is not None
            assert alone is not None
            for name, value in alone.items():
                torch.testing.assert_close(masses[name][n], value[0], atol=1e-4, rtol=0)


@quiet
@by_method
def test_fired_counts_of_a_batch_are_the_sum_of_its_rows(model: Any, methods: list[Method]) -> None:
    with mmfix.mitigate(model, methods) as fix:
        vlm.logits(model, together(ROWS))
    total: dict[str, int] = dict.fromkeys(fix.report().fired, 0)
    for row in ROWS:
        with mmfix.mitigate(model, methods) as single:
            vlm.logits(model, together([row]))
        for name, fired in single.report().fired.items():
            # A head factor acts on padding rows too, harmlessly; a count of score rows leaves them out.
            total[name] += fired.fired
    for name, fired in fix.report().fired.items():
        if methods[0].info.kind != "head scale" and name == "var":
            assert fired.fired == total[name]
        assert (fired.fired > 0) == (total[name] > 0)


@by_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, methods: list[Method], side: str) -> None:
    row = ROWS[0]
    length = len(row[0])
    inputs = together([row], length + 7, side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with mmfix.mitigate(model, methods):
        bare = vlm.logits(model, together([row]))
        padded = vlm.logits(model, inputs)
    kept = padded[:, 7:] if side == "left" else padded[:, :length]
    torch.testing.assert_close(kept, bare, atol=1e-4, rtol=0)


@by_method
def test_left_padding_changes_nothing_in_generation(model: Any, methods: list[Method]) -> None:
    row = ROWS[0]
    with mmfix.mitigate(model, methods):
        bare = vlm.greedy(model, together([row]))
        padded = vlm.greedy(model, together([row], len(row[0]) + 7))
    assert torch.equal(padded.sequences[:, 7:], bare.sequences)
    for a, b in zip(padded.logits, bare.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@quiet
@by_method
def test_a_sequence_of_prompts_equals_fresh_runs(model: Any, methods: list[Method]) -> None:
    """VAR-2: nothing is carried over, whatever came before (other lengths, batch sizes, no picture, telemetry)."""
    prompts = [together([ROWS[2]]), together([ROWS[0]]), together([ROWS[3]]), together(ROWS[:2]), together([ROWS[0]])]
    fresh = []
    for inputs in prompts:
        with mmfix.mitigate(model, methods):
            fresh.append(vlm.greedy(model, inputs, STEPS))
    with mmfix.mitigate(model, methods) as fix:
        for inputs, want in zip(prompts, fresh, strict=True):
            got = vlm.greedy(model, inputs, STEPS)
            assert torch.equal(got.sequences, want.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert fix.report().prompts == 6


@by_method
def test_the_picture_of_one_row_does_not_leak_into_another(model: Any, methods: list[Method]) -> None:
    other = [ROWS[0], (ROWS[1][0], vlm.picture(77))]
    with mmfix.mitigate(model, methods):
        a, b = vlm.logits(model, together(ROWS[:2])), vlm.logits(model, together(other))
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)
    assert (a[1, -1] - b[1, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("order", [["var", "vhr"], ["vhr", "var"]])
def test_two_methods_act_together(model: Any, order: list[str]) -> None:
    inputs = vlm.one()
    logits = {}
    for names in (["var"], ["vhr"], order):
        with mmfix.mitigate(model, [active(name) for name in names]) as fix:
            logits["+".join(names)] = vlm.greedy(model, inputs).logits
        assert set(fix.report().fired) == set(names)
        assert all(fired.fired > 0 for fired in fix.report().fired.values())
    both = logits.pop("+".join(order))
    assert all((both[0] - one[0]).abs().max() > 1e-2 for one in logits.values())


def test_the_order_of_a_mass_move_and_a_head_scale_is_the_same(model: Any) -> None:
    """They act on different things, so the outcome is one; each layer still counts both for their owners."""
    found = []
    for order in (["var", "vhr"], ["vhr", "var"]):
        with mmfix.mitigate(model, [active(name) for name in order]) as fix:
            found.append((vlm.greedy(model, vlm.one()), fix.report().fired))
    for a, b in zip(found[0][0].logits, found[1][0].logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert found[0][1] == found[1][1]
