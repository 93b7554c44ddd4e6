"""DAMRO against two plain passes per token: the prompt, and the prompt whose image is the tower's outlier patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain, vlm
from support.families import FAMILIES
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, UnsupportedModel
from mmfix.methods import DAMRO
from mmfix.selection import Outliers

STEPS = 3


def cls_attention(model: Any, pixels: Tensor, layer: int) -> Tensor:
    """Float64[P, N]: the CLS row of one tower layer, mean over heads, from the layer's own projections."""
    seen: dict[str, Tensor] = {}
    attention = model.model.vision_tower.encoder.layers[layer].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model.model.vision_tower(pixels)
    for hook in hooks:
        hook.remove()
    heads = attention.num_heads
    q, k = (seen[name].double().unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1)


def only_outliers(model: Any, inputs: dict[str, Any], count: int, layer: int) -> Tensor:
    """Float[B, V]: newest logits when every picture is its `count` outlier patches, one prompt at a time."""
    attention = cls_attention(model, inputs["pixel_values"], layer)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    rows = []
    for row, ids in enumerate(inputs["input_ids"]):
        kept = attention[row].topk(count).indices.sort().values
        ids = ids[inputs["attention_mask"][row].bool()]
        place = (ids == vlm.IMAGE_ID).nonzero()[:, 0]
        words = model.get_input_embeddings()(ids)
        parts = [words[: place[0]], features[row].reshape(-1, vlm.HIDDEN)[kept], words[place[-1] + 1 :]]
        with torch.no_grad():
            rows.append(model(inputs_embeds=torch.cat(parts)[None]).logits[0, -1])
    return torch.stack(rows)


def oracle(model: Any, inputs: dict[str, Any], count: int, layer: int, alpha: float, beta: float) -> Tensor:
    def newest(grown: dict[str, Any], _: int) -> Tensor:
        factual = plain.newest(model, grown)
        changed = only_outliers(model, grown, count, layer)
        return plain.cut((1 + alpha) * factual - alpha * changed, factual, beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize(("count", "layer", "alpha"), [(3, -2, 0.5), (1, -1, 2.0), (9, -2, 1.0)])
def test_decoding_equals_two_plain_passes_per_token(model: Any, count: int, layer: int, alpha: float) -> None:
    inputs = plain.ragged()
    want = oracle(model, inputs, count, layer, alpha, 0.01)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(model, DAMRO(count=count, layer=layer, alpha=alpha, beta=0.01)):
            plain.agrees(vlm.greedy(model, inputs, STEPS, **options), want)


def test_all_patches_are_the_clean_prompt(llava: Any) -> None:
    """More patches than there are: the branch is the factual one, and nothing is contrasted."""
    inputs = plain.ragged()
    with mmfix.mitigate(llava, DAMRO(count=100, beta=1e-9)) as fix:
        got = vlm.logits(llava, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], vlm.logits(llava, inputs)[real], atol=1e-4, rtol=0)
    assert fix.report().fired["damro"].fired == 0


def test_a_cut_of_one_is_greedy(llava: Any) -> None:
    """Requirement 1: with beta 1 (the port's cut) every token is the plain model's; with the default it is not bound to
    be. Requirement 2: the report shows that the contrast did act, so that the sameness is the cut's."""
    inputs = plain.ragged()
    clean = vlm.greedy(llava, inputs, 8).sequences
    with mmfix.mitigate(llava, DAMRO(count=2, alpha=2.0, beta=1.0)) as fix:
        assert torch.equal(vlm.greedy(llava, inputs, 8).sequences, clean)
        assert fix.report().fired["damro"].fired > 0
    with mmfix.mitigate(llava, DAMRO(count=2, alpha=2.0, beta=0.1)):
        assert not torch.equal(vlm.greedy(llava, inputs, 8).sequences, clean)


def test_ties_go_to_the_first_patch() -> None:
    attention = torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5]])
    chosen = Outliers(count=2)(attention)
    assert chosen.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]


def test_tiles_and_separators() -> None:
    """LLaVA-NeXT: outliers of every tile; the row separators leave the branch's prompt with the other patches."""
    tiny = FAMILIES["llava-next"]
    model = tiny.build()
    inputs = tiny.inputs(padded=True)
    with mmfix.mitigate(model, DAMRO(count=2, beta=1e-9)) as fix, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=list(range(90, 100)))  # fmt: skip
        image = fix._session.spans.image
    tiles = inputs["pixel_values"].shape[1] if inputs["pixel_values"].ndim == 5 else 1
    factual, branch = image[::2].sum(-1), image[1::2].sum(-1)
    assert ((branch > 0) & (branch <= 2 * tiles) & (branch < factual)).all()
    assert torch.stack(out.logits).isfinite().any()


def test_where_there_is_no_cls_token_it_is_refused() -> None:
    model = FAMILIES["gemma3"].build()
    with pytest.raises(UnsupportedModel, match="no CLS token"), mmfix.mitigate(model, "damro"):
        pass


def test_strength_zero_is_the_cut_alone(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, DAMRO(alpha=0.0, beta=1e-9)) as fix:
        assert torch.equal(vlm.logits(llava, inputs), clean)
        assert fix.rows_per_prompt == 1


@pytest.mark.parametrize("wrong", [{"count": 0}, {"alpha": -2.0}, {"beta": 0.0}, {"layer": 7}])
def test_values_out_of_range_are_refused(llava: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"damro.{next(iter(wrong))}"), mmfix.mitigate(llava, DAMRO(**wrong)):
        pass
