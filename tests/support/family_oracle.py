"""Every method written out from its paper's equations, for any family: each branch from scratch at every step.

No cache, no rows of branches, dense float64 attention registered under a name of its own, and own code for maps, sinks,
head factors and mixing. It shares nothing with mmfix but the weights of the model and the published definition of the
counter-based random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from support.dense_plans import Plan, oracle_attention, random_map, shuffled_map
from support.families import Tiny
from support.family_pictures import IMAGE_ID, Inputs
from torch import Tensor


@dataclass(frozen=True)
class VarPlan:
    """VAR in one layer: `hidden` [B, T, d] is the layer's input at the moment of the call."""

    hidden: list[Tensor]
    image: Tensor  # Bool[B, T] of the prompt
    valid: Tensor
    params: dict[str, Any]

    def __call__(self, weights: Tensor, allowed: Tensor) -> Tensor:
        p, new = self.params, weights.clone()
        length, width = self.image.shape[1], weights.shape[-1]
        x = self.hidden[-1][:, :length].double()
        phi = x[..., list(p["sink_dims"])].abs().amax(-1) / x.square().mean(-1).sqrt()
        for b in range(weights.shape[0]):
            image = _grown(self.image[b], width)
            sink = _grown((phi[b] >= p["tau"]) & self.valid[b], width)
            if not image.any():
                continue
            first = int(image.nonzero().max()) + 1
            for h in range(weights.shape[1]):
                for row in range(first, weights.shape[2]):
                    w = weights[b, h, row]
                    on_image, on_sinks = w[image].sum(), w[image & sink].sum()
                    source, target = w[sink].sum(), w[image & ~sink].sum()
                    seen = (allowed[b, h, row] & image & sink).any()
                    if not seen or on_image < p["min_image_mass"] or on_sinks > p["max_sink_share"] * on_image:
                        continue
                    if source == 0 or target == 0:
                        continue
                    new[b, h, row] = torch.where(sink, (1 - p["move"]) * w, w)
                    new[b, h, row][image & ~sink] *= 1 + p["move"] * source / target
        return new


def _grown(mask: Tensor, width: int) -> Tensor:
    return torch.cat([mask, mask.new_zeros(width - mask.shape[0])])


class Oracle:
    """One family's model and one batch of prompts.

    Args:
        tiny: the family.
        model: its model.
        parts: attention modules of the language model (one per layer) and of the tower, and the decoder layers,
            found by :func:`parts`.
    """

    def __init__(self, tiny: Tiny, model: Any, inputs: Inputs) -> None:
        self.tiny, self.model, self.inputs = tiny, model, inputs
        self.image = inputs["input_ids"] == IMAGE_ID
        self.valid = inputs["attention_mask"].bool()
        self.layers, self.attentions, self.tower = parts(model)

    # -- passes -------------------------------------------------------------------------------------------------

    def grown(self, tokens: Tensor) -> Inputs:
        """Inputs with generated tokens [B, t] appended."""
        new = dict(self.inputs)
        more = tokens.shape[1]
        new["input_ids"] = torch.cat([new["input_ids"], tokens], 1)
        new["attention_mask"] = torch.cat([new["attention_mask"], torch.ones_like(tokens)], 1)
        if self.tiny.types:
            new[self.tiny.types] = torch.cat([new[self.tiny.types], torch.full_like(tokens, self.tiny.later)], 1)
        if "cross_attention_mask" in new:
            last = new["cross_attention_mask"][:, -1:].expand(-1, more, -1, -1)
            new["cross_attention_mask"] = torch.cat([new["cross_attention_mask"], last], 1)
        return new

    def forward(self, inputs: Inputs, plans: dict[Any, Plan]) -> Tensor:
        """Logits [B, T, V] of one pass without a cache."""
        with torch.no_grad(), oracle_attention(self.model, plans):
            return self.model(**inputs, use_cache=False).logits

    def plain(self, inputs: Inputs) -> Tensor:
        return self.forward(inputs, {})

    def language(self, inputs: Inputs, seed: int = 0) -> Tensor:
        """CausalMM's language level: random maps in the self-attention of the middle third."""
        count = len(self.layers)
        valid = inputs["attention_mask"].bool()
        middle = range(count // 3, max(count // 3 + 1, 2 * count // 3))
        chosen = [self.attentions[n] for n in middle if not hasattr(self.layers[n], "cross_attn")]
        return self.forward(inputs, {module: Plan(weights=random_map(valid, seed)) for module in chosen})

    def mma(self, inputs: Inputs) -> Tensor:
        """MMA on prompts of one turn: image tokens see the prompt's later text, as far as a layer's window goes."""
        text = self.valid & ~self.image

        def opening(allowed: Tensor, window: int | None) -> Tensor:
            opened = allowed.clone()
            for b, row in self.image.nonzero().tolist():
                for key in range(row + 1, text.shape[1]):
                    if text[b, key] and (window is None or key - row < window):
                        opened[b, :, row, key] = True
            return opened

        return self.forward(inputs, {module: Plan(allow=opening) for module in self.attentions})

    def vision(self, inputs: Inputs, seed: int = 0) -> Tensor:
        """CausalMM's vision level: keys shuffled in the last layer but one of the tower."""
        return self.forward(inputs, {self.tower[-2]: Plan(weights=lambda w, a: shuffled_map(w, a, seed))})

    def var(self, inputs: Inputs, params: dict[str, Any]) -> Tensor:
        plans, handles = {}, []
        for n in range(params["first_layer"], len(self.layers) - 1):
            seen: list[Tensor] = []
            handles.append(self.layers[n].register_forward_pre_hook(_noting(seen), with_kwargs=True))
            plans[self.attentions[n]] = Plan(weights=VarPlan(seen, self.image, self.valid, params))
        try:
            return self.forward(inputs, plans)
        finally:
            for handle in handles:
                handle.remove()

    def vhr_scales(self, layers: tuple[int, ...], alpha: float = 2.0) -> dict[int, Tensor]:
        """layer → head factors [B, H]: layer by layer, both prompts run anew with the factors found so far."""
        found: dict[int, Tensor] = {}
        batch = self.image.shape[0]
        for n in layers:
            plan = Plan()
            self.forward(self.inputs, {**self._scaled(found), self.attentions[n]: plan})
            assert plan.heads is not None
            with_image = plan.heads[:, :, -1]
            rows = []
            for b in range(batch):
                alone = Plan()
                mine = {m: Plan(scale=s[b : b + 1]) for m, s in ((self.attentions[k], found[k]) for k in found)}
                self.text_only(b, {**mine, self.attentions[n]: alone})
                assert alone.heads is not None
                rows.append(choose_heads(with_image[b], alone.heads[0, :, -1], alpha))
            found[n] = torch.stack(rows)
        return found

    def vhr(self, inputs: Inputs, scales: dict[int, Tensor]) -> Tensor:
        return self.forward(inputs, self._scaled(scales))

    def _scaled(self, scales: dict[int, Tensor]) -> dict[Any, Plan]:
        return {self.attentions[n]: Plan(scale=scale) for n, scale in scales.items()}

    def text_only(self, row: int, plans: dict[Any, Plan]) -> None:
        """The prompt of one row without its image tokens and without padding."""
        keep = self.valid[row] & ~self.image[row]
        short = {"input_ids": self.inputs["input_ids"][row, keep][None]}
        short["attention_mask"] = torch.ones_like(short["input_ids"])
        outer = hasattr(self.model, "qformer")
        if self.tiny.types == "token_type_ids":
            short["token_type_ids"] = torch.zeros_like(short["input_ids"])
        model = self.model.language_model if outer else self.model
        if hasattr(self.model.base_model, "rope_deltas"):
            self.model.base_model.rope_deltas = None
        with torch.no_grad(), oracle_attention(self.model, plans):
            model(**short, use_cache=False)


def choose_heads(with_image: Tensor, alone: Tensor, alpha: float) -> Tensor:
    """[H] factors from head outputs [H, D]: population deviation, mean-of-middles median, outliers dropped."""
    vhd = (with_image - alone).square().sum(-1).sqrt()
    text = alone.square().sum(-1)
    large = [x > x.mean() + ((x - x.mean()) ** 2).mean().sqrt() for x in (vhd, text)]
    vhd = torch.where(large[0] & large[1], torch.zeros_like(vhd), vhd)
    ordered = sorted(vhd.tolist())
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return torch.where(vhd > median, alpha, 1.0).double()


def contrast(factual: Tensor, others: list[Tensor], gamma: float, epsilon: float) -> Tensor:
    """(1 + n gamma) l - gamma sum l', and the plausibility cut on l."""
    mixed = (1 + len(others) * gamma) * factual - gamma * sum(others)
    return mixed.masked_fill(factual < math.log(epsilon) + factual.amax(-1, keepdim=True), -math.inf)


def parts(model: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Decoder layers, their attention modules, and the tower's attention modules, read off the module names."""
    named = dict(model.named_modules())
    language = next(
        prefix
        for prefix in (
            "model.language_model",
            "model.text_model",
            "language_model.model.decoder",
            "language_model.model",
        )
        if f"{prefix}.layers.0" in named
    )
    layers = list(named[f"{language}.layers"])
    attentions = [getattr(layer, "self_attn", None) or layer.cross_attn for layer in layers]
    towers = ("model.vision_tower", "model.visual", "model.vision_model", "vision_model")
    tower = next(prefix for prefix in towers if prefix in named)
    ends = ("self_attn", "attn", "attention")
    vision = [
        module for name, module in named.items() if name.startswith(f"{tower}.") and name.rsplit(".", 1)[-1] in ends
    ]
    return layers, attentions, vision


def _noting(seen: list[Tensor]) -> Any:
    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    return note
