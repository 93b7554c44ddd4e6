"""The hooks that change hidden states, as the methods' answers (:mod:`mmfix.steering`) say.

A prompt without an image keeps its states, and so do the passes that run aside of the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.comparing import last_states
from mmfix.errors import MmfixError
from mmfix.inputs import Inputs, rows_for
from mmfix.readouts import final_norm
from mmfix.retracing import Retracing
from mmfix.steering import Blend, Steer, mlp_of, tower_layers
from mmfix_kernels import Rows

if TYPE_CHECKING:
    from mmfix.layers import LayerState
    from mmfix.session import Session
    from mmfix.spans import TokenSpans


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
        batch = self.steering.batch
        x = output.reshape(batch, -1, output.shape[-1])  # OPT's MLP takes all tokens in one row
        d = edit.direction
        inside = self.steering.inside(edit.rows, x)
        changed = edit(x, rows_for(d, batch)[:, None] if d.ndim == 2 else d)
        self.steering.count(self.state, owner, inside)
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
        wanted = [(owner, m.retrace()) for owner, m in enumerate(session.methods)]
        self.retracing = [Retracing(session, owner, one) for owner, one in wanted if one is not None]
        self.batch = 0
        self.any_image = False
        self.has_image: Tensor | None = None
        self.tower_fired: Tensor | None = None
        self.states: list[tuple[Tensor, Tensor]] | None = None  # of the conversation's first prompt
        self.blended: Tensor | None = None  # sum over the layers of a blend so far, in this pass

    @staticmethod
    def of(session: Session) -> Steering | None:
        """None where no method steers."""
        wanted = (m.steers or m.steers_tower or m.blend() or m.retrace() for m in session.methods)
        return Steering(session) if any(wanted) else None

    @property
    def whole(self) -> bool:
        """Whether a method looks at the whole prompt."""
        return any(m.compares_states or m.retrace() for m in self.session.methods)

    @property
    def acting(self) -> bool:
        """Whether the pass at hand is the real one."""
        return self.session.active and not self.session.aside

    def inside(self, rows: Rows, x: Tensor) -> Tensor:
        """Bool[B, L]: tokens of x [B, L, hidden] that are rows of this kind, in prompts with an image."""
        chosen = self.session.current.rows.get(rows)
        if chosen is None:
            chosen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        chosen = chosen.to(x.device)
        return chosen if self.has_image is None else chosen & self.has_image.to(x.device)[:, None]

    def count(self, state: LayerState, owner: int, changed: Tensor) -> None:
        """Add tokens that a method changed at a layer."""
        total = changed.sum()
        state._counters(changed.device)[owner] += torch.stack([total, total])

    # -- once per pass ------------------------------------------------------------------------------------------

    def prompt(self, spans: TokenSpans, given: Inputs, further: bool, turn: bool, kwargs: dict[str, Any]) -> None:
        """Ask the methods for the edits of a prompt, or of one piece longer.

        Args:
            further: whether a piece came before; turn: whether it was answered.
            kwargs: inputs of the pass.
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
        self.any_image = spans.any_image
        self.has_image = None if bool(with_image.all()) else with_image
        if self.whole and further and not turn:
            names = " and ".join(m.info.name for m in methods if m.compares_states or m.retrace())
            raise MmfixError(
                f"{names} goes by the last token of a prompt, and this one came in pieces, each of which has a last "
                "token; give it at once (no prefill_chunk_size)"
            )
        if any(m.compares_states for m in methods):
            self._compare(spans, given, further, kwargs)
        for n, layer in enumerate(self.layers):
            layer.edits = []
            if spans.any_image:
                site = replace(layer.state.site(spans), states=None if self.states is None else self.states[n])
                layer.edits = [(owner, e) for owner, m in enumerate(methods) for e in m.steering(site)]

    def _compare(self, spans: TokenSpans, given: Inputs, further: bool, kwargs: dict[str, Any]) -> None:
        """States of a new prompt with and without its image; what was found stays for the turns after it."""
        names = " and ".join(m.info.name for m in self.session.methods if m.compares_states)
        if further and bool(spans.image[:, given.past :].any()):
            raise MmfixError(
                f"{names} compares a prompt with and without its image, and this image came in a later turn; give the "
                "whole conversation with a fresh cache"
            )
        if not further:
            self.states = last_states(self.session, kwargs) if spans.any_image else None

    def step(self, batch: int) -> None:
        """Decode tokens, for a batch that may have grown by beams."""
        if batch != self.batch:
            self.batch = batch
            self.has_image = None if self.has_image is None else rows_for(self.has_image, batch)

    def close(self) -> None:
        """At the end of the block: let go of what only a pass needs."""
        self.has_image = self.states = self.blended = None
        for layer in self.layers:
            layer.edits = []
        for one in self.retracing:
            one.close()

    # -- hooks --------------------------------------------------------------------------------------------------

    def hooks(self) -> Iterator[Any]:
        """Install, one handle after the other; the handles that remove it again."""
        family, methods = self.session.family, self.session.methods
        if any(m.steers for m in methods):
            for own, layer in zip(self.layers, family.layers, strict=True):
                yield from own.hooks(layer)
        for one in self.retracing:
            yield from one.hooks()
        for owner, method in enumerate(methods):
            blend = method.blend()
            if blend is not None:
                yield from self._blending(owner, blend)
        if any(m.steers_tower for m in methods):
            layers = tower_layers(family)
            for number, module in enumerate(layers):
                edits = [(n, e) for n, m in enumerate(methods) for e in m.tower_steering(number, len(layers))]
                if edits:
                    yield mlp_of(module).register_forward_hook(self._looking(edits))

    def _blending(self, owner: int, blend: Blend) -> Iterator[Any]:
        family = self.session.family
        norm = final_norm(family)
        first = min(blend.layers)

        def adding(number: int) -> Callable[..., None]:
            def add(module: nn.Module, args: Any, output: Any) -> None:
                if self.acting:
                    x = output[0] if isinstance(output, tuple) else output
                    x = norm.forward(x) if blend.normed else x
                    self.blended = (
                        x if number == first or self.blended is None else self.blended + x.to(self.blended.device)
                    )

            return add

        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not self.acting or self.blended is None or not self.any_image:
                return None
            mean, self.blended = self.blended / len(blend.layers), None
            mixed = output + blend.share * (mean.to(output.device) - output)
            inside = self.inside(Rows.ALL, output)
            self.count(self.layers[-1].state, owner, inside)
            return torch.where(inside[..., None], mixed, output)

        for number in blend.layers:
            yield family.layers[number].register_forward_hook(adding(number))
        yield norm.register_forward_hook(change)

    def _looking(self, edits: list[tuple[int, Steer]]) -> Callable[..., Any]:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            session = self.session
            encoding = session.vision is not None and session.vision.encoding
            if session.family.outer is None and not (session.active or session.turn.generating or encoding):
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
