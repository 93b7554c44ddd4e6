"""A decoding step never holds a whole map: no tensor has as many elements as queries times keys of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from support.cases import NAMES, active
from torch.utils._python_dispatch import TorchDispatchMode

import mmfix

TEXT = 400


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes; views of larger ones aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one._base is None and one.numel() > self.elements:
                self.elements, self.name = one.numel(), str(func)
        return out


def step(model: Any, methods: list[Any], text: int) -> Largest:
    """One generated token after a prompt with `text` tokens of text."""
    inputs = vlm.batch([vlm.tokens(3, "image", text, seed=1)], vlm.picture())
    with torch.no_grad(), mmfix.mitigate(model, methods):
        out = model(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        with Largest() as seen:
            model(input_ids=torch.tensor([[17]]), attention_mask=mask, past_key_values=out.past_key_values)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_has_queries_times_keys(llava: Any, name: str) -> None:
    seen = step(llava, [active(name)], TEXT)
    assert 0 < seen.elements < TEXT * TEXT, f"{seen.name} made {seen.elements} elements"


def test_it_would_be_seen(llava: Any) -> None:
    """The same look at a prefill finds the maps of an edited layer."""
    inputs = vlm.batch([vlm.tokens(3, "image", TEXT, seed=1)], vlm.picture())
    with torch.no_grad(), mmfix.mitigate(llava, active("vaf")), Largest() as seen:
        llava(**inputs)
    assert seen.elements >= TEXT * TEXT
