"""Changes of hidden states as data: what a method may ask for after the MLP of a layer, or after the whole layer.

:mod:`mmfix.steerer` applies them, row by row of the batch. Weights are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from mmfix.errors import UnsupportedModel
from mmfix_kernels import Rows

if TYPE_CHECKING:
    from mmfix.families import Family

_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")  # fc2: OPT, whose MLP is no module


@dataclass(frozen=True, kw_only=True, eq=False)
class Steer:
    """Turn hidden states x towards a direction d, in float32, with n(x) = x / |x|::

        x <- |x| n( n(x) + strength (1 + max(0, cos(x, -d))) n(d) )

    The second factor is there with `opposing` only: states that point away from d are turned more. Without `keep_norm`
    d is added as it is: ``x <- x + strength d``.

    Args:
        direction: Float[hidden], or [B, hidden] with one per row; in a vision tower [hidden] or [tokens, hidden].
        strength: 0 changes nothing.
        opposing, keep_norm: see above.
        rows: which tokens; a tower takes all of them.
        at: "mlp" changes what the layer's MLP gives to the residual stream, "layer" the stream after the layer.
    """

    direction: Tensor
    strength: float
    opposing: bool = False
    keep_norm: bool = True
    rows: Rows = Rows.ALL
    at: Literal["mlp", "layer"] = "mlp"

    def __call__(self, x: Tensor, direction: Tensor | None = None) -> Tensor:
        """x [..., hidden] changed, in its dtype; `direction`: the edit's own in a shape that fits x."""
        d = (self.direction if direction is None else direction).to(x.device, torch.float32)
        states = x.float()
        if not self.keep_norm:
            return (states + self.strength * d).to(x.dtype)
        factor: float | Tensor = self.strength
        if self.opposing:
            factor = factor * (1 + cosine_similarity(states, -d, dim=-1).clamp(min=0))[..., None]
        turned: Tensor = normalize(normalize(states, dim=-1) + factor * normalize(d, dim=-1), dim=-1)
        turned = turned * states.norm(dim=-1, keepdim=True)
        return turned.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Let the language head read earlier layers too, h_l being what layer l gives and n the final norm::

        n(h_last) <- (1 - share) n(h_last) + share mean_{l in layers} h_l

    The head is linear, so that its logits are mixed in the same shares (a soft cap on logits comes after).

    Args:
        share: 0 changes nothing.
        normed: put n(h_l) in place of h_l.
    """

    share: float
    layers: tuple[int, ...]
    normed: bool = False


def mlp_of(layer: nn.Module) -> nn.Module:
    """The MLP of a transformer layer, or the last part of it."""
    for name in _MLPS:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModel(
        f"{type(layer).__name__} has no MLP called {', '.join(_MLPS)}, to change the output of; use another method"
    )


def tower_layers(family: Family) -> tuple[nn.Module, ...]:
    """The layers of the vision tower, in the order in which they run: what its attention modules are part of."""
    attentions = {id(module) for module in family.tower_attentions}
    found = () if family.tower is None else family.tower.modules()
    layers = tuple(m for m in found if any(id(child) in attentions for child in m.children()))
    if not layers:
        raise UnsupportedModel(f"{family.name}: the layers of its vision tower cannot be found; use another method")
    return layers
