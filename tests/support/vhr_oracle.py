"""VHR written out by hand for a LLaMA: two explicit branches, no cache, no padding, no mmfix. Ours, not the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Oracle:
    """What the method should do to one prompt.

    Args:
        logits: [T, V] at the prefill, then [V] per decode step.
        chosen: layer → heads that are scaled.
        greedy: the token that each step would pick.
    """

    logits: list[Tensor] = field(default_factory=list)
    chosen: dict[int, set[int]] = field(default_factory=dict)
    outliers: dict[int, set[int]] = field(default_factory=dict)

    @property
    def greedy(self) -> list[int]:
        return [int(self.logits[0][-1].argmax()), *(int(step.argmax()) for step in self.logits[1:])]


def norm(module: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0..T-1 on [H, T, D]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def head_outputs(model: Any, layer: Any, x: Tensor) -> Tensor:
    """[T, H, D]: plain causal attention of one layer, before its output projection."""
    config = model.config.text_config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    attention, inner = layer.self_attn, norm(layer.input_layernorm, x)
    theta = float(config.rope_parameters["rope_theta"])
    q = rotate((inner @ attention.q_proj.weight.T).view(-1, heads, width).transpose(0, 1), theta)
    k = rotate((inner @ attention.k_proj.weight.T).view(-1, kv_heads, width).transpose(0, 1), theta)
    v = (inner @ attention.v_proj.weight.T).view(-1, kv_heads, width).transpose(0, 1)
    out = []
    for h in range(heads):
        scores = q[h] @ k[h * kv_heads // heads].T / math.sqrt(width)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        out.append(scores.softmax(-1) @ v[h * kv_heads // heads])
    return torch.stack(out, dim=1)


def after_attention(layer: Any, x: Tensor, heads: Tensor) -> Tensor:
    x = x + heads.flatten(1) @ layer.self_attn.o_proj.weight.T
    inner, mlp = norm(layer.post_attention_layernorm, x), layer.mlp
    gate = inner @ mlp.gate_proj.weight.T
    return x + (gate * gate.sigmoid() * (inner @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def choose(with_image: Tensor, without: Tensor, drop_outliers: bool) -> tuple[set[int], set[int]]:
    """(chosen heads, outlier heads) from last-position head outputs [H, D]; population std, mean-of-middles median."""
    vhd = (with_image - without).double().square().sum(-1).sqrt()
    text = without.double().square().sum(-1)

    def large(values: Tensor) -> Tensor:
        deviation = ((values - values.mean()) ** 2).mean().sqrt()
        return values > values.mean() + deviation

    outliers = large(vhd) & large(text) if drop_outliers else torch.zeros(len(vhd), dtype=torch.bool)
    vhd[outliers] = 0.0
    middle = sorted(vhd.tolist())
    median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
    return {h for h in range(len(vhd)) if vhd[h] > median}, set(outliers.nonzero().flatten().tolist())


@torch.no_grad()
def vhr(
    model: Any, ids: list[int], pictures: Tensor | None, layers: tuple[int, ...], follow: tuple[int, ...] = (),
    alpha: float = 2.0, drop_outliers: bool = True, scale_text: bool = True,
) -> Oracle:  # fmt: skip
    """One unpadded prompt and the tokens that follow it, recomputed from scratch at every step."""
    language, image_id = model.model.language_model, model.config.image_token_id
    result = Oracle()
    row = torch.tensor(ids)
    embedded = language.embed_tokens.weight[row].clone()
    if pictures is not None:
        features = model.model.get_image_features(pixel_values=pictures).pooler_output
        embedded[row == image_id] = torch.cat(list(features))
    text = embedded[row != image_id]
    for step in range(len(follow) + 1):
        tail = language.embed_tokens.weight[torch.tensor(follow[:step], dtype=torch.long)]
        x, alone = torch.cat([embedded, tail]), text
        for n, layer in enumerate(language.layers):
            heads, heads_alone = head_outputs(model, layer, x), head_outputs(model, layer, alone)
            if n in layers:
                if step == 0:
                    result.chosen[n], result.outliers[n] = choose(heads[-1], heads_alone[-1], drop_outliers)
                for h in result.chosen[n]:
                    heads[:, h] *= alpha
                    if scale_text:
                        heads_alone[:, h] *= alpha
            x, alone = after_attention(layer, x, heads), after_attention(layer, alone, heads_alone)
        scores = norm(language.norm, x) @ model.lm_head.weight.T
        result.logits.append(scores if step == 0 else scores[-1])
    return result
