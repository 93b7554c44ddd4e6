"""Plain passes of a tiny model for oracles of methods: no engine, no cache, dense attention in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from support import vlm
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfix

Inputs = dict[str, Any]
# (scores [B, H, L, S] in float64, Bool of the keys allowed, layer) → scores
Scores = Callable[[Tensor, Tensor, int], Tensor]
# (head outputs [B, H, L, D], scores, weights, layer) → head outputs
Heads = Callable[[Tensor, Tensor, Tensor, int], Tensor]

ROWS = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]


def ragged(pictures: Tensor | None = None) -> Inputs:
    """Two prompts of different length, left-padded, each with a picture."""
    return vlm.batch(ROWS, vlm.picture(1, 2) if pictures is None else pictures)


def text_only(inputs: Inputs) -> Inputs:
    """The prompts (and what was generated after them) without their image tokens, left-padded anew."""
    rows = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        rows.append([t for t, real in zip(ids, mask, strict=True) if real and t != vlm.IMAGE_ID])
    return vlm.batch(rows)


def grown(inputs: Inputs, token: Tensor) -> Inputs:
    """The inputs with one more token, Int64[B, 1]."""
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], token], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1),
    }


def decoded(inputs: Inputs, newest: Callable[[Inputs, int], Tensor], steps: int) -> Tensor:
    """Logits [B, steps, V] of greedy decoding; `newest` gives those of the last token, from inputs and step."""
    rows = []
    for step in range(steps):
        rows.append(newest(inputs, step))
        inputs = grown(inputs, rows[-1].argmax(-1, keepdim=True))
    return torch.stack(rows, 1)


def newest(model: Any, inputs: Inputs) -> Tensor:
    """Float[B, V]: logits of the last token by a plain pass."""
    return vlm.logits(model, inputs)[:, -1]


def cut(mixed: Tensor, factual: Tensor, beta: float) -> Tensor:
    """The plausibility cut by probabilities."""
    probabilities = factual.double().softmax(-1)
    return mixed.masked_fill(probabilities < beta * probabilities.amax(-1, keepdim=True), -math.inf)


def dense(model: Any, inputs: Inputs, scores: Scores | None = None, heads: Heads | None = None) -> Tensor:
    """Float[B, T, V]: logits with scores, or head outputs, changed by a plain function."""
    valid = inputs["attention_mask"].bool()

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
        found = query.double() @ key.transpose(-1, -2) * scaling
        length = found.shape[-1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None, :]
        if scores is not None:
            found = scores(found, allowed, module.layer_idx)
        weights = found.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
        output = weights @ value
        if heads is not None:
            output = heads(output, found, weights, module.layer_idx)
        return output.float().transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("plain-oracle", attend)
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation_internal = "plain-oracle"
    try:
        return vlm.logits(model, inputs)
    finally:
        decoder.config._attn_implementation_internal = before


def image(inputs: Inputs) -> Tensor:
    """Bool[B, T] of image tokens."""
    found: Tensor = inputs["input_ids"] == vlm.IMAGE_ID
    return found


def agrees(out: Any, want: Tensor) -> None:
    """A generation has these logits [B, steps, V], -inf in the same places, and their best tokens."""
    steps = want.shape[1]
    got = torch.stack(out.logits, 1)
    assert torch.equal(got.isneginf(), want.isneginf())
    torch.testing.assert_close(got, want.to(got.dtype), atol=2e-4, rtol=0)
    assert torch.equal(out.sequences[:, -steps:], want.argmax(-1))


def early(model: Any, inputs: Inputs, layers: tuple[int, ...], norm: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, V] of the last token, and those read out after some layers, by one plain pass.

    Args:
        norm: what is put before the language head; None takes the model's own.
    """
    norm = model.get_decoder().norm if norm is None else norm
    with torch.no_grad():
        out = model(**inputs, use_cache=False, output_hidden_states=True)
        return out.logits[:, -1], [model.lm_head(norm(out.hidden_states[n][:, -1])) for n in layers]


def agrees_with_every_cache(model: Any, method: Any, want: Tensor) -> None:
    """Greedy decoding of :func:`ragged` with a growing cache, none, and one of fixed size; no second row."""
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(model, method) as fix:
            agrees(vlm.greedy(model, ragged(), want.shape[1], **options), want)
            assert fix.rows_per_prompt == 1


def agrees_under_beams_and_draws(model: Any, method: Any, want: Tensor) -> None:
    """A beam's first scores are the logits [B, V] of :func:`ragged`; sampling draws from them."""
    with mmfix.mitigate(model, method):
        beams = vlm.greedy(model, ragged(), 2, num_beams=2)
        drawn = vlm.greedy(model, ragged(), 1, do_sample=True, top_k=0)
    torch.testing.assert_close(beams.logits[0][::2].to(want.dtype), want, atol=2e-4, rtol=0)
    assert all(want[row, token].isfinite() for row, token in enumerate(drawn.sequences[:, -1].tolist()))
