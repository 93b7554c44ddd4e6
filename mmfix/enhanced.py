"""One attention layer computed a second time on edited weights, and carried to the logits by the last layer alone.

The second output skips the layers between: it enters the last layer beside a share of that layer's own input, takes its
MLP, and is read out. Nothing of it goes into the cache, so it costs one layer and no row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix_kernels import AttentionCall, Group, KeyGroups, Label, row_weights
from mmfix_kernels.call import additive_mask

if TYPE_CHECKING:
    from mmfix.families import Family

# (weights Float[B, H, n, S], text keys, image keys, both Bool[B, 1, n, S]) → weights
Edit = Callable[[Tensor, Tensor, Tensor], Tensor]
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_INPUT_NORM = ("input_layernorm", "self_attn_layer_norm", "ln_1")


@dataclass(frozen=True, kw_only=True)
class Enhanced:
    """A readout of the last layer, entered by another layer's attention output on edited weights.

    With h that output and x what the last layer receives, its attention is left out and its input is
    ``share * x + norm(h)``, norm being the last layer's own on its input.

    Args:
        layer: the layer whose attention is computed again.
        edit: changes its weights. Text keys are those that the row sees and that are neither of an image nor the first
            token of the prompt.
        share: of the last layer's input.
    """

    layer: int
    edit: Edit
    share: float = 0.2


class Enhancing:
    """What a session needs for one :class:`Enhanced` readout."""

    def __init__(self, family: Family, wanted: Enhanced) -> None:
        self.wanted = wanted
        self.project = _part(family, family.attentions[wanted.layer], _OUTPUT, "output projection")
        self.norm = _part(family, family.layers[-1], _INPUT_NORM, "norm on its input")
        self.alone = False  # whether the last layer runs without its attention
        self._entering: Tensor | None = None  # [B, n, hidden], for the newest n positions

    def read(self, layer: int, call: AttentionCall, groups: Callable[[int], KeyGroups], keep: Any) -> None:
        """At an attention call of the pass: the second output, for the positions whose logits are asked for."""
        if layer != self.wanted.layer:
            return
        batch, heads, length, _ = call.query.shape
        count = min(keep, length) if isinstance(keep, int) and keep else length
        rows = torch.arange(length - count, length, device=call.query.device).expand(batch, -1)
        labelled = groups(call.keys)
        image, text = (
            labelled.member(Group.IMAGE)[:, None, None],
            _text(labelled.labels, labelled.before)[:, None, None],
        )
        seen = _seen(call)[:, :, -count:]
        weights = self.wanted.edit(row_weights(call, rows), text & seen, image & seen)
        value = call.whole(call.prefix_value, call.value).float()
        output = weights.view(batch, value.shape[1], -1, call.keys) @ value
        output = output.view(batch, heads, count, -1).transpose(1, 2).flatten(2)
        self._entering = self.project(output.to(call.query.dtype))

    def leaving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """After the last layer: what it gives when entered so; [B, L, hidden], of which the newest positions count."""
        entering, self._entering = self._entering, None
        assert entering is not None
        state = args[0] if args else kwargs["hidden_states"]
        count = entering.shape[1]
        newest = self.wanted.share * state[:, -count:] + self.norm(entering)
        changed = torch.cat([state[:, : state.shape[1] - count], newest], dim=1)
        rest = {name: None if hasattr(value, "get_seq_length") else value for name, value in kwargs.items()}
        given = {"hidden_states": changed}
        self.alone = True
        try:
            found = module.forward(changed, *args[1:], **rest) if args else module.forward(**{**rest, **given})
        finally:
            self.alone = False
        left: Tensor = found[0] if isinstance(found, tuple) else found
        return left


def _text(labels: Tensor, before: Tensor | None = None) -> Tensor:
    """Bool[B, S]: keys that are no image, no padding, and not the first token (which collects attention).

    Args:
        before: Int64[B], tokens that a sliding window has dropped in front of these keys; None for none.
    """
    real = labels != int(Label.PADDING)
    number = real.cumsum(-1) if before is None else real.cumsum(-1) + before[:, None]
    first = real & (number == 1)
    image = (labels == int(Label.IMAGE)) | (labels == int(Label.IMAGE_SINK))
    return real & ~image & ~first


def _seen(call: AttentionCall) -> Tensor:
    """Bool[B or 1, H or 1, L, S]: keys that each row may attend to."""
    mask = additive_mask(call)
    length, device = call.query.shape[2], call.query.device
    if mask is None:
        return torch.ones(1, 1, length, call.keys, dtype=torch.bool, device=device)
    return (mask > float("-inf")).expand(-1, -1, length, -1)


def _part(family: Family, module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModel(
        f"{family.name}: {type(module).__name__} has no {what} called {', '.join(names)}, so its attention cannot be "
        "carried to the last layer; use another method"
    )
