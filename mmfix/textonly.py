"""The prompt without its image, carried through the layers beside the real prompt, once per prefill.

Head methods compare head outputs with and without the image while earlier layers are already scaled in both
branches, so the two prefills must advance layer by layer. The layers are called with the arguments the decoder itself
computes for the short prompt (positions, mask), which a dry pass with the layers stubbed out records; that keeps this
independent of any model's layer signature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix.families import Family
from mmfix.spans import TokenSpans
from mmfix_kernels import AttentionCall, HeadScale, grouped_attention

if TYPE_CHECKING:
    from mmfix.session import Session


class _Probed(Exception):  # noqa: N818 - control flow, never seen outside
    """Head outputs are known; the rest of the layer need not run."""


class TextOnly:
    """The text-only branch of one prefill: :meth:`record` once, then probe and advance layer by layer."""

    @classmethod
    def of(cls, session: Session, types: Tensor | None) -> TextOnly:
        """The branch of the prompt at hand; `types` are the ``token_type_ids`` of the pass."""
        talk = session.talk
        assert talk is not None
        if types is not None and types.shape[1] < talk.spans.length:  # a further turn: those of the first are gone
            types = None
        types = None if types is None else types[:, : talk.spans.length]
        scaled = all(m.scales_text_only for m in session.methods)
        return cls(session.family, talk.spans, talk.ids, talk.embeds, max(session.head_layers), scaled, types)

    def __init__(
        self,
        family: Family,
        spans: TokenSpans,
        ids: Tensor | None,
        embeds: Tensor | None,
        last_layer: int,
        scaled: bool,
        types: Tensor | None = None,
    ) -> None:
        """Embed the prompt without its image tokens, right-aligned and with positions closed up.

        Args:
            ids, embeds: the prompt's tokens [B, T] or their embeddings [B, T, hidden]; one of them.
            last_layer: the last layer whose head outputs will be asked for.
            scaled: whether head factors act on this branch too.
            types: ``token_type_ids`` [B, T] where the model makes its mask from them (PaliGemma, Gemma 3).
        """
        self.family = family
        self.last_layer = last_layer
        self.scaled = scaled
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.running: str = ""  # "", "probe" or "advance": whose attention call it is
        self._heads: Tensor | None = None
        self._scales: list[HeadScale] = []

        keep = spans.valid & ~spans.image
        lengths = keep.sum(-1)
        width = max(1, int(lengths.max()))
        # Kept tokens, in order, pushed to the right; a stable sort of the mask does it for every row at once.
        order = torch.argsort(keep.int(), dim=-1, stable=True)[:, -width:]
        self.mask = torch.arange(width, device=keep.device)[None, :] >= width - lengths[:, None]
        if embeds is None:
            assert ids is not None
            embeds = family.model.get_input_embeddings()(ids.masked_fill(spans.image, 0))
        assert embeds is not None
        self.hidden = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))  # [B, width, hidden]
        self.types = None if types is None else types.gather(1, order)

    def record(self) -> None:
        """Call the model with every layer stubbed out, to learn what it gives its layers."""

        def stub(*args: Any, **kwargs: Any) -> Any:
            self.arguments.append((args, kwargs))
            return args[0] if args else kwargs["hidden_states"]

        # The wrapper around the decoder makes the mask in some models, and only it knows token types.
        base = self.family.model.base_model
        typed = {} if self.types is None else {"token_type_ids": self.types}

        before = [layer.__dict__.get("forward") for layer in self.family.layers]
        self.running = "advance"  # keeps the layer hooks quiet
        try:
            for layer in self.family.layers:
                layer.__dict__["forward"] = stub
            mask = self.mask.long()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            base(inputs_embeds=self.hidden, attention_mask=mask, position_ids=positions, use_cache=False, **typed)
            args, kwargs = self.arguments[0]  # with learned positions added, where the model has them
            self.hidden = args[0] if args else kwargs["hidden_states"]
        finally:
            self.running = ""
            for layer, forward in zip(self.family.layers, before, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = forward

    def probe(self, layer: int) -> None:
        """Head outputs of `layer` at the last position, without running the rest of the layer."""
        self._run(layer, "probe")

    def heads(self) -> Tensor:
        """[B, H, D]: head outputs at the last position, from the latest :meth:`probe`."""
        assert self._heads is not None
        return self._heads

    def advance(self, layer: int, scales: list[HeadScale]) -> bool:
        """Run `layer`, with the head factors just chosen ; True when no later layer is needed."""
        if layer >= self.last_layer:
            return True
        self._scales = scales if self.scaled else []
        output = self._run(layer, "advance")
        self.hidden = output[0] if isinstance(output, tuple) else output
        return False

    def _run(self, layer: int, purpose: str) -> Any:
        args, kwargs = self.arguments[layer]
        kwargs = dict(kwargs)
        if args:
            args = (self.hidden, *args[1:])
        else:
            kwargs["hidden_states"] = self.hidden
        self.running = purpose
        try:
            return self.family.layers[layer](*args, **kwargs)
        except _Probed:
            return None
        finally:
            self.running = ""

    def attend(self, inputs: dict[str, Any], backend: str | None) -> tuple[Tensor, None]:
        """An attention call that belongs to this branch."""
        edits = [] if self.running == "probe" else self._scales
        output = grouped_attention(AttentionCall(**inputs, edits=edits), backend).output
        if self.running == "probe":
            self._heads = output[:, :, -1]
            raise _Probed
        return output.transpose(1, 2).contiguous(), None
