"""What the class token of the vision tower looks at: a number for every patch, laid onto the prompt's image tokens.

The tower runs before the language model, and not always inside its forward pass: ``generate()`` encodes pictures first.
So what it attended to is kept as it runs, and asked for at the first attention call of the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix.distinct import spread
from mmfix.errors import MmfixError, UnsupportedModel
from mmfix.spans import TokenSpans
from mmfix.tower import cls_attention, has_class_token

if TYPE_CHECKING:
    from mmfix.families import Family
    from mmfix.layers import LayerState
    from mmfix.method import Method
    from mmfix.session import Session

Maps = dict[int, Tensor]  # tower layer → Float32[P, H, N], attention of the class token of P pictures to N patches


def why_not(family: Family) -> str:
    """Why what a class token looks at says nothing of the prompt's image tokens; "" when it does."""
    if not family.tower_attentions or not has_class_token(family.tower):
        return f"the vision tower ({type(family.tower).__name__}) has no class token whose attention can be read"
    if family.outer is not None or family.resampler is not None:
        return "image tokens are queries of a resampler, not patches of the tower"
    if getattr(family.whole.config, "image_grid_pinpoints", None):
        return "pictures are cut into tiles whose patches are joined and cropped before they become image tokens"
    return ""


class TowerWatch:
    """The class token's attention of a session's pictures, and the numbers that methods make of it.

    Args:
        family: the model; its tower has a class token.
        methods: of the session.
    """

    def __init__(self, family: Family, methods: list[Method]) -> None:
        self.family = family
        self.count = len(family.tower_attentions)
        self.askers = [(n, m) for n, m in enumerate(methods) if m.tower_layers(self.count)]
        self.layers = {layer for _, m in self.askers for layer in m.tower_layers(self.count)}
        self.maps: Maps = {}
        self.fresh = False  # whether a picture was encoded since the last prompt asked
        self.values: dict[int, Tensor] = {}  # per asking method, Float32[pictures, N] of the conversation
        self.laid: dict[int, Tensor] = {}  # the same on the prompt's tokens, Float32[B, T]
        self.due = ""  # "prompt" or "piece", until its first attention call

    def see(self, layer: int, inputs: dict[str, Any]) -> None:
        """One attention call of the tower, on the plain picture."""
        if layer not in self.layers:
            return
        if inputs["mask"] is not None:
            raise UnsupportedModel(f"{self.family.name}: the tower masks patches, so its class token cannot be read")
        self.maps[layer] = spread(cls_attention(inputs))
        self.fresh = True

    def ask(self, state: LayerState) -> None:
        """At a prompt, before a layer's attention: the edits that methods make of the pictures."""
        session = state.session
        spans = session.spans
        assert spans is not None
        if self.due:
            self._read(session, spans)
            self.due = ""
        if not spans.any_image:
            return
        for owner, one in self.askers:
            for edit in one.patch_edits(state.site(spans), self.laid[owner]):
                state.edits.append(edit)
                state.owners.append(owner)
        state.reserve()

    def _read(self, session: Session, spans: TokenSpans) -> None:
        """Numbers of the pictures of a new prompt, or of the new pictures of a further turn."""
        if self.due == "prompt":
            self.values = {}
        if not spans.any_image:
            return
        if not self.fresh and not self.values:
            raise MmfixError(
                f"{' and '.join(m.info.name for _, m in self.askers)}: the picture was encoded outside mitigate(), "
                "which cannot look at the picture anew; pass input_ids and pixel_values to the model inside the block"
            )
        if self.fresh:
            for owner, one in self.askers:
                new = one.patches({layer: self.maps[layer] for layer in one.tower_layers(self.count)})
                old = self.values.get(owner)
                self.values[owner] = new if old is None else torch.cat([old, new])
            self.fresh = False
        self.laid = {owner: self._lay(values, spans, session.rows_per_prompt) for owner, values in self.values.items()}

    def _lay(self, values: Tensor, spans: TokenSpans, branches: int) -> Tensor:
        """Float32[rows, T] from Float32[pictures, N]: the pictures in the order of the prompts' image tokens.

        Beams and several sequences repeat each prompt, contrast branches each of those; all see the same pictures.
        """
        if self.family.whole.config.to_dict().get("vision_feature_select_strategy") == "full":
            values = torch.nn.functional.pad(values, (1, 0))  # the class token is an image token too
        image = spans.image[::branches]
        tokens, known = int(image.sum()), values.numel()
        copies = tokens // known if known and tokens % known == 0 else 0
        counts = image.sum(-1)[:: max(1, copies)].tolist()
        if not copies or any(count % values.shape[1] for count in counts):
            raise UnsupportedModel(
                f"{self.family.name}: the prompts have {tokens} image tokens and the tower saw {values.shape[0]} "
                f"pictures of {values.shape[1]} patches, which do not match one to one; use a model whose image tokens "
                "are patches, and give a prompt at once, not in pieces"
            )
        parts = torch.split(values.flatten().to(image.device), counts)
        laid = torch.zeros(spans.image.shape, device=image.device)
        for row in range(laid.shape[0]):
            places = spans.image[row]
            if bool(places.any()):
                laid[row, places] = parts[row // branches // copies]
        return laid
