"""The ways to compute one call that are compared: our backends and what others would run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mmfix_kernels import AttentionCall, backends, grouped_attention
from mmfix_kernels.attention import BACKENDS

Work = Callable[[], object]


def ours(call: AttentionCall) -> dict[str, Work | str]:
    """Each backend, or why it cannot serve the call here."""
    out: dict[str, Work | str] = {}
    for name, missing in backends().items():
        if name == "reference":
            continue  # the definition: readable, not fast
        reason = missing or BACKENDS[name].why_not(call)
        out[name] = reason or (lambda name=name: grouped_attention(call, name))
    return out


def default_sdpa(call: AttentionCall) -> Work:
    """Vanilla attention without any edit: what a mitigation is compared with."""
    causal = call.is_causal and call.query.shape[2] > 1
    grouped = call.query.shape[1] != call.key.shape[1]
    return lambda: F.scaled_dot_product_attention(
        call.query, call.key, call.value, is_causal=causal, scale=call.factor, enable_gqa=grouped
    )


def repeated(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = call.query.shape[1] // call.key.shape[1]
    return call.key.repeat_interleave(repeats, 1), call.value.repeat_interleave(repeats, 1)


def bias_of(call: AttentionCall) -> torch.Tensor:
    """A materialised bias [B, 1, L, S]: causal, plus a constant on image keys."""
    assert call.groups is not None
    rows, keys = call.query.shape[2], call.key.shape[2]
    bias = torch.zeros(call.query.shape[0], 1, rows, keys, dtype=call.query.dtype, device=call.query.device)
    bias += 0.5 * ((call.groups.labels == 1)[:, None, None, :]).to(bias.dtype)
    if rows > 1:
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=bias.device).triu(1)
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


def peers(call: AttentionCall) -> dict[str, Callable[[AttentionCall], Work]]:
    """Builders by name: each allocates what it needs only when it is measured."""
    return {"sdpa-default": default_sdpa, "sdpa-bias": biased_sdpa, "eager-with-maps": eager_with_maps}
