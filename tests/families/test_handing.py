"""Pictures encoded beforehand, for a model whose ``forward`` takes pixels only."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from support.families import FAMILIES

import mmfix

OPTIONS = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def pixels_only(model: Any) -> Any:
    """The model as older versions of transformers have it."""
    forward = model.forward

    @functools.wraps(forward)
    def older(*args: Any, **kwargs: Any) -> Any:
        assert "mm_encoder_outputs" not in kwargs
        return forward(*args, **kwargs)

    parameters = [p for p in inspect.signature(forward).parameters.values() if p.name != "mm_encoder_outputs"]
    older.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.__dict__["forward"] = older
    return model


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "smolvlm", "pixtral", "paligemma"])
def test_branches_see_the_same_pictures(name: str) -> None:
    """Beside the plain picture a noised one, none, and other maps of the language model."""
    tiny = FAMILIES[name]
    inputs = tiny.inputs(padded=True)
    for method in ("vcd", "pai", "causalmm-language"):
        wanted = tiny.build()
        with torch.no_grad(), mmfix.mitigate(wanted, method):
            want = wanted.generate(**inputs, **OPTIONS)
        model = pixels_only(tiny.build())
        before = model.forward
        with torch.no_grad(), mmfix.mitigate(model, method):
            got = model.generate(**inputs, **OPTIONS)
            direct = model(**inputs).logits[:, -1]
        assert model.forward is before
        assert "get_image_features" not in model.base_model.__dict__
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * float(b[b.isfinite()].abs().max()), rtol=0)
        torch.testing.assert_close(
            direct, want.logits[0], atol=1e-4 * float(direct[direct.isfinite()].abs().max()), rtol=0
        )
