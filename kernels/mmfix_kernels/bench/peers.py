"""The ways to compute one call that are compared: our backends and what others would run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from mmfix_kernels import AttentionCall, ScoreEdit, backends, grouped_attention
from mmfix_kernels.attention import BACKENDS

Work = Callable[[], object]
COMPILED_AT = 4096  # keys of the cases in which FlexAttention takes part


def ours(call: AttentionCall) -> dict[str, Work | str]:
    """Each backend, or why it cannot serve the call here."""
    out: dict[str, Work | str] = {}
    for name, missing in backends().items():
        if name == "reference":
            continue  # the definition: readable, not fast
        reason = missing or BACKENDS[name].why_not(call)
        out[name] = reason or partial(grouped_attention, call, name)
    return out


def whole(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as a cache without sharing holds them."""
    return call.whole(call.prefix_key, call.key), call.whole(call.prefix_value, call.value)


def default_sdpa(call: AttentionCall) -> Work:
    """Vanilla attention without any edit: what a mitigation is compared with."""
    causal = call.is_causal and call.query.shape[2] > 1
    grouped = call.query.shape[1] != call.key.shape[1]
    key, value = whole(call)
    return lambda: F.scaled_dot_product_attention(
        call.query, key, value, is_causal=causal, scale=call.factor, enable_gqa=grouped
    )


def repeated(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = call.query.shape[1] // call.key.shape[1]
    key, value = whole(call)
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def bias_of(call: AttentionCall) -> torch.Tensor:
    """A materialised bias [B, 1, L, S]: causal, plus a constant on image keys."""
    assert call.groups is not None
    rows = call.query.shape[2]
    bias = torch.zeros(call.query.shape[0], 1, rows, call.keys, dtype=call.query.dtype, device=call.query.device)
    bias += 0.5 * ((call.groups.labels == 1)[:, None, None, :]).to(bias.dtype)
    if rows > 1:
        hidden = torch.ones(rows, call.keys, dtype=torch.bool, device=bias.device).triu(1)
        bias.masked_fill_(hidden, float("-inf"))
    return bias


def biased_sdpa(call: AttentionCall) -> Work:
    """SDPA with a materialised bias: the usual way to change scores; it cannot move masses."""
    bias, (key, value) = bias_of(call), repeated(call)
    return lambda: F.scaled_dot_product_attention(call.query, key, value, attn_mask=bias, scale=call.factor)


def eager_with_maps(call: AttentionCall) -> Work:
    """What the released implementations need: the whole map, changed and then multiplied."""
    bias = bias_of(call)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        key, value = repeated(call)
        scores = call.query @ key.transpose(2, 3) * call.factor + bias
        weights = scores.softmax(-1, dtype=torch.float32).to(call.query.dtype)
        return weights @ value, weights

    return work


def flex(call: AttentionCall) -> Work:
    """FlexAttention, compiled, with the call's score edits as a score function."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert call.groups is not None
    labels, length = call.groups.labels, call.query.shape[2]
    gain = sum(edit.abs_gain for _, edit in call.score_edits if isinstance(edit, ScoreEdit))
    torch._dynamo.reset()  # after eight shapes Dynamo would give up and run it uncompiled
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def lift(score: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        label = labels[b, key]
        touched = ((label == 1) | (label == 3)) & (row == length - 1)
        return torch.where(touched, score + gain * score.abs(), score)

    mask = None
    if call.is_causal and length > 1:
        mask = create_block_mask(
            lambda b, h, row, key: row >= key, None, None, length, call.keys, device=str(call.query.device)
        )
    key, value = whole(call)
    grouped = call.query.shape[1] != call.key.shape[1]
    score_mod = lift if gain else None
    return lambda: compiled(
        call.query, key, value, score_mod=score_mod, block_mask=mask, scale=call.factor, enable_gqa=grouped
    )


def flash(call: AttentionCall) -> Work:
    """FlashAttention-2 without any edit, where it is installed."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    query, key, value = (t.transpose(1, 2).contiguous() for t in (call.query, *whole(call)))
    causal = call.is_causal and call.query.shape[2] > 1
    return lambda: flash_attn_func(query, key, value, softmax_scale=call.factor, causal=causal)


def peers(call: AttentionCall) -> dict[str, Callable[[], Work] | str]:
    """Builders by name, or why a peer cannot take part; each allocates what it needs only when it is measured."""
    found: dict[str, Callable[[], Work] | str] = {
        "sdpa-default": lambda: default_sdpa(call),
        "sdpa-bias": lambda: biased_sdpa(call),
        "eager-with-maps": lambda: eager_with_maps(call),
    }
    if call.query.device.type != "cuda":
        return found
    found["flex"] = lambda: flex(call)
    if call.weight_edits:
        found["flex"] = "an edit of weights is no function of one score"
    elif call.keys != COMPILED_AT or call.query.shape[:2] != (1, call.key.shape[1]):
        found["flex"] = f"compiled for every shape anew: measured at {COMPILED_AT} keys, one row and no grouped heads"
    found["flash-2"] = lambda: flash(call)
    if find_spec("flash_attn") is None:
        found["flash-2"] = "flash_attn is not installed"
    return found
