"""The start of a prompt that no branch changes is computed and stored once, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm

import mmfix
import mmfix.prefix
from mmfix.branches import Branch
from mmfix.methods import CausalMMLanguage, CausalMMVision
from mmfix.pictures import Blank
from mmfix.prefix import SharedLayer, shared_length
from mmfix.prompts import PromptEdit
from mmfix.spans import build
from mmfix_kernels import AttentionCall, Group, MapReplacement, Rows, ScoreEdit, grouped_attention

STEPS = 6
AFTER = CausalMMLanguage(language="random", language_rows="after_image", epsilon=1e-9)
VISION = CausalMMVision(epsilon=1e-9)


def prompts(count: int) -> dict[str, Any]:
    rows = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(5, "image", 7, seed=2)][:count]
    return vlm.batch(rows, vlm.picture(0, count))


@pytest.mark.parametrize("method", [AFTER, VISION], ids=lambda m: m.info.name)
@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (2, {}), (2, {"num_beams": 3}), (1, {"prompt_lookup_num_tokens": 2}), (2, {"num_return_sequences": 2})],
    ids=["greedy", "ragged", "beams", "lookup", "several"],
)
def test_sharing_changes_nothing(
    model: Any, method: Any, count: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prompts(count)
    if "num_return_sequences" in options:
        options = {**options, "do_sample": True, "temperature": 0.7}
    shared: list[int] = []
    share = mmfix.prefix.share
    monkeypatch.setattr(mmfix.prefix, "share", lambda cache, rows: (shared.append(rows), share(cache, rows)))
    found = []
    for least in (3, 10**6):
        monkeypatch.setattr(mmfix.prefix, "LEAST", least)
        torch.manual_seed(0)
        with mmfix.mitigate(model, method) as fix:
            found.append((vlm.greedy(model, inputs, STEPS, **options), fix.report()))
    assert shared == [2], "the first run shares, the second does not"
    (got, with_sharing), (want, without) = found
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert with_sharing.fired == without.fired
    assert with_sharing.prompts == without.prompts


def test_the_prefix_is_stored_once(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmfix.prefix, "LEAST", 3)
    inputs = prompts(2)
    with mmfix.mitigate(llava, AFTER):
        out = vlm.greedy(llava, inputs, STEPS)
        layers = out.past_key_values.layers
        assert all(isinstance(layer, SharedLayer) for layer in layers)
        total = layers[0].get_seq_length()
        shared = 13  # the first prompt's image ends there: BOS, three tokens, nine of the image
        assert layers[0].prefix_keys.shape[:3] == (2, vlm.HEADS, shared)
        assert layers[0].keys.shape[:3] == (4, vlm.HEADS, total - shared)
    assert type(out.past_key_values.layers[0]).__name__ == "DynamicLayer", "what lives on is an ordinary cache"
    assert out.past_key_values.layers[0].keys.shape[:3] == (2, vlm.HEADS, total), "and holds the factual rows alone"


def test_what_is_shared_depends_on_what_a_branch_changes() -> None:
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[0, 4:9] = image[1, 6:11] = True
    spans = build(image, torch.ones_like(image))
    after = ScoreEdit(group=Group.IMAGE, rows=Rows.AFTER_IMAGE, gain=0.5)
    assert shared_length((Branch(edits=(after,)),), spans) == 9
    assert shared_length((Branch(edits=(ScoreEdit(group=Group.IMAGE, rows=Rows.LAST, gain=0.5),)),), spans) == 19
    assert shared_length((Branch(edits=(MapReplacement(kind="uniform"),)),), spans) == 0
    assert shared_length((Branch(pixels=Blank()),), spans) == 4
    assert shared_length((Branch(edits=(after,)), Branch(pixels=Blank())), spans) == 4
    assert shared_length((Branch(image=False),), spans) == 0
    assert shared_length((Branch(prompt=PromptEdit(tokens=(5,))),), spans) == 0


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_a_shared_prefix_is_the_repeated_one(heads: int, rows: int) -> None:
    """Two prompts of three branches each: prefix read in place, and repeated, in both backends, with an edit."""
    torch.manual_seed(heads)
    prefix, suffix = torch.randn(2, 2, heads, 10, 8), torch.randn(2, 6, heads, 12, 8)
    query = torch.randn(6, 4, rows, 8)
    mask = torch.ones(rows, 22, dtype=torch.bool).tril(22 - rows).expand(6, 1, rows, 22).clone()
    mask[1, ..., :2] = False
    labels = torch.zeros(6, 22, dtype=torch.int8)
    labels[:, 3:9] = 1
    from mmfix_kernels import KeyGroups

    chosen = torch.tensor([False, True, False, False, True, False])
    edit = ScoreEdit(group=Group.IMAGE, gain=0.2, batch=chosen)
    call = {"query": query, "mask": mask, "groups": KeyGroups.plain(labels), "edits": [edit]}
    want = grouped_attention(
        AttentionCall(
            **call,
            key=torch.cat([prefix[0].repeat_interleave(3, 0), suffix[0]], 2),
            value=torch.cat([prefix[1].repeat_interleave(3, 0), suffix[1]], 2),
        ),
        "reference",
    )
    for backend in ("reference", "sdpa"):
        got = grouped_attention(
            AttentionCall(**call, key=suffix[0], value=suffix[1], prefix_key=prefix[0], prefix_value=prefix[1]), backend
        )
        torch.testing.assert_close(got.output, want.output, atol=1e-5, rtol=0)
        assert got.fired[0, 0] == want.fired[0, 0]
    plain = grouped_attention(AttentionCall(**{**call, "edits": []}, key=suffix[0], value=suffix[1],
        prefix_key=prefix[0], prefix_value=prefix[1]))  # fmt: skip
    assert (plain.output[chosen] - want.output[chosen]).abs().max() > 1e-3
    torch.testing.assert_close(plain.output[~chosen], want.output[~chosen], atol=1e-5, rtol=0)
