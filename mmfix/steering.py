"""Hidden states that a method changes: after the MLP of a layer, or after the whole layer.

A method answers with data (:class:`Steer`), and hooks on the language model's layers apply it, row by row of the batch;
a method may steer the layers of the vision tower too. Weights are never touched. A prompt without an image keeps its
states, and so do the passes that run aside of the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from mmfix.errors import MmfixError, UnsupportedModel
from mmfix.inputs import Inputs, rows_for
from mmfix_kernels import Rows

if TYPE_CHECKING:
    from mmfix.families import Family
    from mmfix.layers import LayerState
    from mmfix.session import Session
    from mmfix.spans import TokenSpans

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


class LayerSteering:
    """One layer of the language model: its edits for the prompt at hand, and the hooks that apply them."""

    def __init__(self, state: LayerState, steering: Steering) -> None:
        self.state, self.steering = state, steering
        self.edits: list[tuple[int, Steer]] = []  # with the position of the method that asked for it

    def hooks(self, layer: nn.Module) -> Iterator[Any]:
        yield mlp_of(layer).register_forward_hook(self._changing("mlp"))
        yield layer.register_forward_hook(self._changing("layer"))

    def _changing(self, place: str) -> Callable[..., Any]:
        def change(module: nn.Module, args: Any, output: Any) -> Any:
            wanted = [(owner, edit) for owner, edit in self.edits if edit.at == place]
            if not wanted or not self.steering.acting:
                return None
            x = output[0] if isinstance(output, tuple) else output
            for owner, edit in wanted:
                x = self._apply(owner, edit, x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return change

    def _apply(self, owner: int, edit: Steer, output: Tensor) -> Tensor:
        steering, current = self.steering, self.state.session.current
        batch = steering.batch
        x = output.reshape(batch, -1, output.shape[-1])  # OPT's MLP takes all tokens in one row
        d = edit.direction
        rows, has_image = current.rows.get(edit.rows), steering.has_image
        inside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if rows is None else rows.to(x.device)
        if has_image is not None:
            inside = inside & has_image.to(x.device)[:, None]
        changed = edit(x, rows_for(d, batch)[:, None] if d.ndim == 2 else d)
        count = inside.sum()
        self.state._counters(x.device)[owner] += torch.stack([count, count])
        return torch.where(inside[..., None], changed, x).reshape(output.shape)


class Steering:
    """The steering side of a session.

    Attributes:
        batch: rows of the batch at hand.
        has_image: Bool[B], or None where every prompt has an image.
        tower_fired: Int64[methods, 2], patches of pictures changed and looked at.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.layers = [LayerSteering(state, self) for state in session.layers]
        self.batch = 0
        self.has_image: Tensor | None = None
        self.tower_fired: Tensor | None = None

    @staticmethod
    def of(session: Session) -> Steering | None:
        """None where no method steers."""
        return Steering(session) if any(m.steers or m.steers_tower for m in session.methods) else None

    @property
    def acting(self) -> bool:
        """Whether the pass at hand is the real one."""
        return self.session.active and not self.session.aside

    # -- once per pass ------------------------------------------------------------------------------------------

    def prompt(self, spans: TokenSpans, given: Inputs, further: bool, turn: bool) -> None:
        """Ask the methods for the edits of a prompt, or of one piece longer.

        Args:
            further: whether a piece came before; turn: whether it was answered.
        """
        family, methods = self.session.family, self.session.methods
        names = " and ".join(m.info.name for m in methods if m.steers or m.steers_tower)
        if given.ids is None and family.outer is None and any(m.steers_tower for m in methods):
            raise MmfixError(
                f"the image's features are already merged into inputs_embeds, so {names} cannot look at the picture "
                "anew; pass input_ids and pixel_values"
            )
        with_image, before = spans.has_image, self.has_image
        known = None if before is None or turn or not further else rows_for(before, len(with_image))
        if known is not None and bool((known != with_image).any()):
            raise MmfixError(
                f"the prompt's first image came after its first piece, which {names} left alone; give the prompt at "
                "once (no prefill_chunk_size)"
            )
        self.batch = len(with_image)
        self.has_image = None if bool(with_image.all()) else with_image
        for layer in self.layers:
            layer.edits = []
            if spans.any_image:
                site = layer.state.site(spans)
                layer.edits = [(n, e) for n, m in enumerate(methods) for e in m.steering(site)]

    def step(self, batch: int) -> None:
        """Decode tokens, for a batch that may have grown by beams."""
        if batch != self.batch:
            self.batch = batch
            self.has_image = None if self.has_image is None else rows_for(self.has_image, batch)

    def close(self) -> None:
        """At the end of the block: let go of what only a pass needs."""
        self.has_image = None
        for layer in self.layers:
            layer.edits = []

    # -- hooks --------------------------------------------------------------------------------------------------

    def hooks(self) -> Iterator[Any]:
        """Install, one handle after the other; the handles that remove it again."""
        family, methods = self.session.family, self.session.methods
        if any(m.steers for m in methods):
            for own, layer in zip(self.layers, family.layers, strict=True):
                yield from own.hooks(layer)
        if any(m.steers_tower for m in methods):
            layers = tower_layers(family)
            for number, module in enumerate(layers):
                edits = [(n, e) for n, m in enumerate(methods) for e in m.tower_steering(number, len(layers))]
                if edits:
                    yield mlp_of(module).register_forward_hook(self._looking(edits))

    def _looking(self, edits: list[tuple[int, Steer]]) -> Callable[..., Any]:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            session = self.session
            if session.family.outer is None and not (session.active or session.turn.generating):
                return None  # a user's own look at a picture
            x = output
            for owner, edit in edits:
                tokens = edit.direction.shape[0] if edit.direction.ndim == 2 else 1
                if tokens not in (1, x.shape[-2]):
                    raise MmfixError(
                        f"{session.methods[owner].info.name}: its directions are for pictures of {tokens} patches and "
                        f"this one has {x.shape[-2]}; calibrate with pictures of this size"
                    )
                x = edit(x)
                self._tower_counters(x.device)[owner] += x[..., 0].numel()
            return x

        return change

    def _tower_counters(self, device: torch.device) -> Tensor:
        if self.tower_fired is None:
            with torch.inference_mode(False):  # the counters outlive the caller's mode
                self.tower_fired = torch.zeros(len(self.session.methods), 2, dtype=torch.int64, device=device)
        return self.tower_fired


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
