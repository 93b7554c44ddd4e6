"""Every family: what is found in it, what changes nothing, what is put back, and what a batch must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import Tiny
from support.family_models import LAYERS
from support.family_pictures import IMAGE_ID

import mmfix
from mmfix.families import why_not

OPTIONS = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
NOTHING: dict[str, dict[str, Any]] = {
    "var": {"sink_dims": (3, 7), "tau": 1.0, "move": 0.0}, "vhr": {"alpha": 1.0},
    "causalmm": {"gamma": 0.0, "epsilon": 1e-9}, "mma": {"until": "prompt", "layers": ()},
}  # fmt: skip


def traits(model: Any) -> dict[str, Any]:
    """What can be seen of a model from outside: attributes, hooks, configs, weights."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("hooks")}
        config = vars(module).get("config")
        setting = getattr(config, "_attn_implementation_internal", None)
        found[name] = sorted(vars(module)), hooks, id(config), setting
    found["config"] = repr(model.config.to_dict())
    found["tensors"] = {k: (v.data_ptr(), v._version) for k, v in model.state_dict(keep_vars=True).items()}
    return found


def test_what_is_found(tiny: Tiny, model: Any) -> None:
    family = mmfix.describe(model)
    assert family.image_token_id == IMAGE_ID
    assert family.num_layers == len(family.attentions) == (6 if tiny.name == "mllama" else LAYERS)
    assert family.num_heads == 4
    assert all(hasattr(module, "q_proj") for module in family.attentions)
    assert len(family.tower_attentions) == 3
    assert family.whole is model
    assert bool(family.cross_layers) == (tiny.name == "mllama")
    assert (family.outer is model) == (tiny.name in ("blip-2", "instructblip"))


def test_nothing_asked_is_exactly_nothing(tiny: Tiny, model: Any) -> None:
    """No method, and every method at strength zero: bit-equal logits at prefill and while generating."""
    inputs = tiny.inputs(padded=True)
    family = mmfix.describe(model)
    with torch.no_grad():
        plain, out = model(**inputs).logits, model.generate(**inputs, **OPTIONS)
        for name, params in (("none", {}), *NOTHING.items()):
            method = None if name == "none" else mmfix.method(name, **params)
            if method is not None and why_not(family, method):
                continue
            with mmfix.mitigate(model, method):
                assert torch.equal(model(**inputs).logits, plain), name
                got = model.generate(**inputs, **OPTIONS)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, out.logits, strict=True)), name


def test_the_model_is_left_as_it_was(tiny: Tiny, model: Any) -> None:
    """After a return and after an exception, also where the vision tower and the encoder were changed."""
    inputs = tiny.inputs()
    with torch.no_grad():
        plain = model(**inputs).logits
        before = traits(model)
        with mmfix.mitigate(model, "causalmm", epsilon=1e-6):
            inside = model.generate(**inputs, **OPTIONS).logits
            assert traits(model) != before
        assert (inside[0] - plain[:, -1]).abs().max() > 0.01
        assert traits(model) == before
        with pytest.raises(KeyError), mmfix.mitigate(model, "causalmm"):  # noqa: PT012
            model(**inputs)
            raise KeyError
        assert traits(model) == before
        assert torch.equal(model(**inputs).logits, plain)


def test_a_batch_equals_single_prompts(tiny: Tiny, model: Any) -> None:
    """Rows, their pictures (packed in one row of some towers) and their branches do not see each other."""
    rows = tiny.rows(padded=True)
    with torch.no_grad(), mmfix.mitigate(model, "causalmm", epsilon=1e-6, vision="random"):
        together = model.generate(**tiny.batch(rows), **OPTIONS).logits
        for n, row in enumerate(rows):
            alone = model.generate(**tiny.batch([row], seed=n), **OPTIONS).logits
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[n], b[0], atol=1e-5 * float(b.abs().max()), rtol=0)
