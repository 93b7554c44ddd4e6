"""Every pair of methods: it runs, and gives what the dense definition of its edits gives; or it is refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import vlm
from support.cases import active

import mmfix
from mmfix.errors import ConflictError

PAIRS = tuple(itertools.combinations(mmfix.methods(), 2))
STEPS = 2
WHY = (  # of every refusal of a pair
    "computes attention by itself",
    "a branch of the first lacks patches that the other counts",
    "the logits of a rewritten prompt are not combined",
    "both decide how the next token is chosen",
    "both combine logits",
    "reads layers out beside the model's own logits",
    "both rewrite positions",
    "change the mask of layer",
)


class Words:
    """A tokenizer of which every token is a word, so that HALC looks at the first one again when the second is said."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{token}" for token in ids)


def logits(model: Any, names: tuple[str, ...]) -> torch.Tensor:
    """Logits of every step, Float[B, T, V], of a left-padded batch of two prompts; of a search answers and scores."""
    inputs = vlm.batch(
        [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(2, "image", 3, seed=2)],
        torch.cat([vlm.picture(1), vlm.picture(2)]),
    )
    focal = "halc" in names  # whose words cost prompts of their own: one prompt will do
    if focal:
        inputs = vlm.one(seed=1)
    search = any(mmfix.methods()[name].kind == "search" for name in names)
    with mmfix.mitigate(model, [active(name) for name in names], processor=Words() if focal else None) as handle:
        found = vlm.greedy(model, inputs, STEPS, output_logits=not search, output_scores=search)
        assert not focal or handle.report().passes_per_token > 1, "no word was looked at again"
    if search:
        return torch.cat([found.sequences.float(), found.sequences_scores[:, None]], dim=1)
    return torch.stack(found.logits, 1)


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
        assert any(reason in refusal for reason in WHY), f"it does not say why: {refusal}"
        assert "; use " in refusal, f"it does not say what to do: {refusal}"
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
