"""PositionalHidden against a dense attention written from its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor
from transformers.models.llama import modeling_llama

import mmfix
from mmfix.errors import MethodError, MmfixError, UnsupportedModel
from mmfix.methods import PositionalHidden
from mmfix.methods.positional_hidden import known_for

STEPS = 3
DIMS, LAYERS, FACTOR = (5, 40), (1, 3), -3.0
ROWS = [vlm.tokens(2, "image", 4, seed=1), vlm.tokens(5, "image", 6, seed=2), vlm.tokens(7, seed=3)]


def dense(model: Any, inputs: dict[str, Any], ends: Tensor, acts: Tensor, last: int, skip: int) -> Tensor:
    """Logits [B, T, V]: rows from the last of the prompt on attend with scaled queries to scaled keys.

    `ends`: Int64[B], the prompts' last place; `acts`: Bool[B], prompts that are changed.
    """
    mask = inputs["attention_mask"].bool()
    length = mask.shape[1]
    place = torch.arange(length)
    seen = (place[None, :] <= place[:, None]) & mask[:, None, None, :]
    late = (place[None, :] > (ends - last)[:, None]) & acts[:, None]
    counted = mask.long().cumsum(-1) - 1

    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> Any:
        batch = hidden_states.shape[0]

        def heads(x: Tensor, projection: Any) -> Tensor:
            return projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)

        changed = hidden_states.clone()
        for b in range(batch):
            for t in range(length):
                if acts[b] and counted[b, t] >= skip and self.layer_idx in LAYERS:
                    for dim in DIMS:
                        changed[b, t, dim] *= FACTOR
        value = heads(hidden_states, self.v_proj).repeat_interleave(self.num_key_value_groups, 1)
        outputs = []
        for x in (hidden_states, changed):
            q, k = modeling_llama.apply_rotary_pos_emb(
                heads(x, self.q_proj), heads(x, self.k_proj), *position_embeddings
            )
            k = k.repeat_interleave(self.num_key_value_groups, 1)
            weights = (
                (q @ k.transpose(-1, -2) * self.scaling).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            )
            outputs.append(weights @ value)
        out = torch.where(late[:, None, :, None], outputs[1], outputs[0])
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), None

    patch = pytest.MonkeyPatch()
    patch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    try:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return vlm.logits(model, {**inputs, "position_ids": positions})
    finally:
        patch.undo()


def extended(inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
    }


@pytest.mark.parametrize(("last", "skip"), [(1, 0), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_it_is_the_definition(grouped: Any, last: int, skip: int, options: dict[str, Any]) -> None:
    """Prompts with and without a picture in a padded batch, at the prompt and in decoding."""
    inputs = vlm.batch(ROWS, vlm.picture(0, 2))
    method = PositionalHidden(dims=DIMS, factor=FACTOR, layers=LAYERS, last=last, skip=skip)
    with mmfix.mitigate(grouped, method) as fix:
        got = vlm.greedy(grouped, inputs, STEPS, suppress_tokens=[vlm.IMAGE_ID], **options)
        fired = fix.report().fired["positional-hidden"]
    length = inputs["input_ids"].shape[1]
    ends, acts = torch.full((3,), length - 1), torch.tensor([True, True, False])
    for step in range(STEPS):
        given = extended(inputs, got.sequences[:, length : length + step])
        want = dense(grouped, given, ends, acts, last, skip)[:, -1]
        torch.testing.assert_close(got.logits[step], want, atol=1e-4, rtol=0)
    assert (got.logits[0] - vlm.logits(grouped, inputs)[:, -1])[:2].abs().amax(-1).min() > 1e-2
    if not options:
        assert fired.fired == len(LAYERS) * vlm.HEADS * 2 * (last + STEPS - 1)


def test_the_cache_holds_changed_keys_and_plain_values(llava: Any) -> None:
    """POSHID-1, in the first layer that is changed; the rows before the last are those of the plain model."""
    inputs = vlm.one()
    with torch.no_grad():
        plain = llava(**inputs, use_cache=True)
        with mmfix.mitigate(llava, PositionalHidden(dims=DIMS, factor=FACTOR, layers=LAYERS)):
            got = llava(**inputs, use_cache=True)
    before, after = plain.past_key_values.layers[1], got.past_key_values.layers[1]
    assert (after.keys - before.keys).abs().amax((0, 1, 3)).min() > 1e-2
    torch.testing.assert_close(after.values, before.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.logits[:, :-1], plain.logits[:, :-1], atol=1e-5, rtol=0)
    assert (got.logits[:, -1] - plain.logits[:, -1]).abs().max() > 1e-2


def test_edits_of_another_method_act_on_all_rows(llava: Any) -> None:
    """A mask that opens and a head factor stay where they were in the rows that are computed a second time."""
    inputs = vlm.one()
    others = [mmfix.method("frame-block"), mmfix.method("vhr")]
    with mmfix.mitigate(llava, others, telemetry=True) as fix:
        want = vlm.logits(llava, inputs)
        fired = fix.report().fired
    both = [*others, PositionalHidden(dims=DIMS, factor=1.0 + 1e-7, layers=LAYERS)]
    with mmfix.mitigate(llava, both, telemetry=True) as fix:
        got = vlm.logits(llava, inputs)
        again = fix.report().fired
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert all(again[name] == one for name, one in fired.items())


def test_published_dimensions(llava: Any) -> None:
    def found(kind: str, text: str, hidden: int, layers: int, vocabulary: int) -> int | None:
        class Shape:
            fingerprint = (kind, text, hidden, layers, vocabulary)

        known = known_for(Shape())  # type: ignore[arg-type]
        return None if known is None else known.dim

    assert found("llava", "llama", 4096, 32, 32064) == 2393
    assert found("llava_next", "llama", 5120, 40, 32000) == 4923
    assert found("llava_next", "mistral", 4096, 32, 32064) == 213
    assert found("llava", "llama", 4096, 32, 128256) is None
    assert found("idefics2", "llama", 4096, 32, 32000) is None


def test_what_is_refused(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MethodError, match="mmfix calibrate positional"), mmfix.mitigate(llava, "positional-hidden"):
        pass
    for params in ({"dims": ()}, {"dims": (1, 1)}, {"factor": 11.0}, {"last": 0}, {"skip": -1}):
        with pytest.raises(MethodError, match="positional-hidden"):
            mmfix.method("positional-hidden", **params)
    with pytest.raises(MethodError, match="dimensions 0 to 63"), mmfix.mitigate(llava, PositionalHidden(dims=(64,))):
        pass
    method = PositionalHidden(dims=DIMS, layers=LAYERS)
    with mmfix.mitigate(llava, method), pytest.raises(MmfixError, match="pieces"):
        vlm.greedy(llava, vlm.one(), prefill_chunk_size=6)
    fused = vlm.build("llava")
    attention = fused.model.language_model.layers[1].self_attn
    attention.qkv_proj = attention.q_proj
    del attention.q_proj
    with pytest.raises(UnsupportedModel, match="LlamaAttention has no separate q_proj"), mmfix.mitigate(fused, method):
        pass
