"""Positional dimensions: found where they are planted, and not where curves turn or shake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm

import mmfix
from mmfix.errors import MmfixError
from mmfix.positional_search import candidates, mean_states, random_texts, roughness, steady


def planted() -> torch.Tensor:
    """[layers, T, hidden]: 2 falls smoothly, 5 rises with some noise, 7 turns, 9 rises in one layer of eight alone."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, 200, 12, generator=generator)
    x = torch.linspace(0, 1, 200)
    states[:, :, 2] = -4 * x.sqrt()
    states[:, :, 5] = 9 * x**2 + 0.05 * states[:, :, 5]
    states[:, :, 7] = 20 * (x - 0.6) ** 2
    states[0, :, 9] = 30 * x
    states[1:, :, 9] = torch.sin(40 * x)
    return states


def test_planted_dimensions_in_order_of_smoothness() -> None:
    states = planted()
    assert candidates(states)[:2] == [2, 5]
    assert not steady(states)[:, 7].any()
    assert steady(states)[:, 9].sum() <= 2
    assert 9 not in candidates(states)
    assert 7 not in candidates(states)
    assert candidates(states, top=1) == [2]
    assert (roughness(states)[:, 2] < roughness(states)[:, 5]).all()
    scaled = states * torch.linspace(0.1, 50, 12)
    assert candidates(scaled) == candidates(states), "a dimension's size says nothing"


def test_states_are_layer_inputs_averaged_over_texts(llava: Any) -> None:
    texts = random_texts(range(5, 90), 5, 40)
    assert torch.equal(texts, random_texts(range(5, 90), 5, 40))
    assert not torch.equal(texts, random_texts(range(5, 90), 5, 40, seed=1))
    assert 5 <= int(texts.min()) <= int(texts.max()) < 90
    seen: list[int] = []
    got = mean_states(mmfix.describe(llava), texts, 2, seen.append)
    with torch.no_grad():
        want = [llava(input_ids=row[None], output_hidden_states=True).hidden_states for row in texts]
    for layer in range(vlm.LAYERS):
        torch.testing.assert_close(got[layer], torch.cat([h[layer] for h in want]).mean(0), atol=1e-4, rtol=0)
    assert seen == [2, 2, 1]


def test_what_cannot_be_found(llava: Any) -> None:
    with pytest.raises(MmfixError, match="too short"):
        candidates(torch.randn(4, 20, 8))
    noise = torch.sin(torch.arange(300.0) / 9)[None, :, None].expand(4, -1, 8)
    with pytest.raises(MmfixError, match="no hidden dimension"):
        candidates(noise)
    with pytest.raises(MmfixError, match="no texts"):
        mean_states(mmfix.describe(llava), torch.zeros(0, 40, dtype=torch.long))
