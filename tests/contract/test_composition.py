"""Every pair of methods: it runs, and gives what the dense definition of its edits gives; or it is refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import vlm
from support.cases import active
from support.speech import Speech

import mmfix
from mmfix.errors import ConflictError

DECIDES = ("contrast", "prompt", "search")
CORE = ("causalmm", "memvr", "paint", "sofa", "var", "vhr")


def worthwhile(pair: tuple[str, ...]) -> bool:
    """Not every pair with HALC, whose words cost prompts of their own: it leaves the passes of others as OPERA does."""
    others = set(pair) - {"halc"}
    return len(others) == 2 or any(name in CORE or mmfix.methods()[name].kind in DECIDES for name in others)


PAIRS = [pair for pair in itertools.combinations(mmfix.methods(), 2) if worthwhile(pair)]
STEPS = 2


def logits(model: Any, names: tuple[str, ...]) -> torch.Tensor:
    """Logits of every step, Float[B, T, V], of a left-padded batch of two prompts; the answers of a search."""
    inputs = vlm.batch(
        [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(2, "image", 3, seed=2)],
        torch.cat([vlm.picture(1), vlm.picture(2)]),
    )
    if "halc" in names:  # a pass of its own for every word: one prompt will do
        inputs = vlm.one(seed=1)
    search = any(mmfix.methods()[name].kind == "search" for name in names)
    processor = Speech() if "halc" in names else None
    with mmfix.mitigate(model, [active(name) for name in names], processor=processor):
        found = vlm.greedy(model, inputs, STEPS, output_logits=not search)
    return found.sequences.float() if search else torch.stack(found.logits, 1)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_gives_what_the_reference_gives_or_is_refused(
    llava: Any, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = ""
    try:
        got = logits(llava, pair)
    except ConflictError as error:
        refusal = str(error)
    if refusal:
        assert all(repr(name) in refusal for name in pair), f"not both are named: {refusal}"
        assert not any("_mmfix" in name for module in llava.modules() for name in module.__dict__)
        return
    monkeypatch.setenv("MMFIX_BACKEND", "reference")
    torch.testing.assert_close(got, logits(llava, pair), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
def test_both_of_a_pair_act(llava: Any) -> None:
    """Not one of them: each pair that runs differs from either method alone."""
    alone = {name: logits(llava, (name,)) for name in ("var", "vhr", "mma", "causalmm-language", "vaf")}
    for first, second in itertools.combinations(alone, 2):
        both = logits(llava, (first, second))
        for name in (first, second):
            assert (both - alone[name]).nan_to_num(0, 0, 0).abs().max() > 1e-3, f"{first}+{second} is {name} alone"
