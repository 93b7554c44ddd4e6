"""Every core method in every family against an oracle that computes each branch alone, from scratch, at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import vlm
from support.families import FAMILIES, Tiny
from support.family_oracle import Oracle, contrast
from support.family_pictures import Inputs
from torch import Tensor

import mmfix
from mmfix.families import why_not
from mmfix.method import Method
from mmfix.segments import MaskEdit, Role, Segments

STEPS = 3
TOLERANCE = 1e-5  # of the largest logit
SPECIAL = list(range(90, 100))  # picture placeholders and markers: not to be generated
VAR = {
    "sink_dims": (3, 7, 12, 20),
    "tau": 1.5,
    "min_image_mass": 0.1,
    "max_sink_share": 0.9,
    "move": 0.9,
    "first_layer": 1,
}
OPTIONS = {
    "max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    "suppress_tokens": SPECIAL,
}  # fmt: skip
GAMMA, EPSILON = 1.0, 1e-6
CUT = {"gamma": GAMMA, "epsilon": EPSILON}
METHODS: dict[str, dict[str, Any]] = {
    "plausibility": {"beta": 0.2}, "var": VAR, "vhr": {}, "causalmm": CUT, "causalmm-vision": CUT,
    "causalmm-language": CUT, "mma": {"until": "prompt"},
}  # fmt: skip


def expectation(oracle: Oracle, name: str) -> Callable[[Inputs], Tensor]:
    """Inputs → logits [B, T, V] that the method should give."""
    if name == "var":
        return lambda inputs: oracle.var(inputs, VAR)
    if name == "vhr":
        scales = oracle.vhr_scales((1, 2, 3))
        return lambda inputs: oracle.vhr(inputs, scales)
    if name == "mma":
        return oracle.mma
    if name == "plausibility":
        return lambda inputs: contrast(oracle.plain(inputs), [], 0.0, 0.2)
    levels = {
        "causalmm": (oracle.vision, oracle.language),
        "causalmm-vision": (oracle.vision,),
        "causalmm-language": (oracle.language,),
    }[name]
    return lambda inputs: contrast(oracle.plain(inputs), [level(inputs) for level in levels], GAMMA, EPSILON)


def close(got: Tensor, want: Tensor) -> None:
    scale = float(want[want.isfinite()].abs().max())
    torch.testing.assert_close(got, want.to(got.dtype), atol=TOLERANCE * scale, rtol=0)


def test_a_start_that_no_branch_changes(tiny: Tiny, model: Any) -> None:
    """Enough text before the picture for branches to share its keys and values, where a family's cache allows it."""
    inputs = tiny.batch(tiny.rows(padded=True, system=20))
    oracle = Oracle(tiny, model, inputs)
    expected = expectation(oracle, "causalmm-vision")
    with torch.no_grad(), mmfix.mitigate(model, "causalmm-vision", **CUT):
        out = model.generate(**inputs, **OPTIONS)
    for step in range(STEPS):
        close(out.logits[step], expected(oracle.grown(out.sequences[:, -STEPS:][:, :step]))[:, -1])


@pytest.mark.parametrize("name", METHODS)
def test_prefill_and_greedy_decoding_equal_the_oracle(tiny: Tiny, model: Any, name: str) -> None:
    reason = why_not(mmfix.describe(model), mmfix.method(name, **METHODS[name]))
    if reason:
        pytest.skip(f"does not apply: {reason}")
    inputs = tiny.inputs(padded=True)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs).logits
        with mmfix.mitigate(model, name, **METHODS[name]) as fix:
            whole = model(**inputs).logits
            out = model.generate(**inputs, **OPTIONS)
        assert torch.equal(model(**inputs).logits, plain)
    assert fix.report().fired[name].fired > 0
    expected = expectation(Oracle(tiny, model, inputs), name)
    first = expected(inputs)
    assert (first - plain)[valid].abs().max() > 0.01, "the method does nothing here: the test shows nothing"
    close(whole[valid], first[valid])
    tokens = out.sequences[:, -STEPS:]
    for step in range(STEPS):
        want = expected(Oracle(tiny, model, inputs).grown(tokens[:, :step]))[:, -1]
        close(out.logits[step], want)
        assert torch.equal(tokens[:, step], want[:, : SPECIAL[0]].argmax(-1))


class Causal(Method):
    """Hides what a picture's tokens see of their picture beyond themselves."""

    def mask(self, site: Any) -> list[MaskEdit]:
        return [MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation=_later, allow=False)]


def _later(segments: Segments, rows: slice) -> Tensor:
    place = torch.arange(segments.image.shape[1])
    return (place[None, :] > place[rows, None])[None].expand(len(segments.image), -1, -1)


Causal.info = mmfix.method("mma", until="prompt").info


def test_a_picture_that_the_model_shows_whole_can_be_made_causal() -> None:
    """Gemma 3 without token types is causal throughout; closing what lies ahead gives the same."""
    tiny = FAMILIES["gemma3"]
    model, inputs = tiny.build(), tiny.inputs(padded=True)
    want = vlm.logits(model, {**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])})
    with mmfix.mitigate(model, Causal()):
        got = vlm.logits(model, inputs)
    valid = inputs["attention_mask"].bool()
    assert (vlm.logits(model, inputs) - want)[valid].abs().max() > 1e-3
    torch.testing.assert_close(got[valid], want[valid], atol=1e-5, rtol=0)
