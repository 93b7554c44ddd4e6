"""Models whose own ``generate()`` encodes the picture and then drives a language model with embeddings.

BLIP-2 and InstructBLIP run tower, Q-Former and projection, put the result in place of the placeholders' embeddings, and
call ``language_model.generate(inputs_embeds=…)``. The language model never sees which tokens were the picture, so that
is noted where the outer model embeds its ``input_ids``; and other looks at the picture are taken by running the same
tower and Q-Former calls again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix.families import Family

if TYPE_CHECKING:
    from mmfix.session import Session

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Outer:
    """What the outer model did with the prompt at hand.

    Attributes:
        looks: features [B, tokens, hidden] that stand in for the image tokens, one per look; the plain one first.
    """

    def __init__(self, family: Family, session: Session) -> None:
        self.family, self.session = family, session
        self.looks: list[Tensor] = []
        self._calls: dict[str, Call] = {}
        self._again = False  # whether a look is being taken

    def hooks(self) -> list[Any]:
        """Install; the handles that remove it again."""
        model = self.family.outer
        handles = [
            model.get_input_embeddings().register_forward_pre_hook(self._embedding),
            model.vision_model.register_forward_pre_hook(self._noting("tower"), with_kwargs=True),
        ]
        session = self.session
        if session.vision is not None and session.vision.needed:
            missing = [name for name in ("qformer", "language_projection") if not hasattr(model, name)]
            if missing:
                raise UnsupportedModel(
                    f"{self.family.name} has no {' and no '.join(missing)}, so the picture cannot be looked at again; "
                    "use a method that leaves the vision tower alone"
                )
            handles += [
                model.qformer.register_forward_pre_hook(self._noting("qformer"), with_kwargs=True),
                model.language_projection.register_forward_hook(self._projected),
            ]
        return handles

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._again:
                return
            if name == "tower":  # a new call of the outer model
                self.looks, self._calls, self.session.image_mask = [], {}, None
            self._calls[name] = args, kwargs

        return note

    def _embedding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The outer model embeds its prompt: the placeholders among the ids are the picture."""
        if not self.session.active:
            self.session.image_mask = args[0] == self.family.image_token_id

    def _projected(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The plain features are known: take the other looks."""
        if self._again:
            return
        assert self.session.vision is not None
        self._again = True
        try:
            pixels = self._pixels()
            again = functools.partial(self._encode, args[0].shape[1])
            self.looks = [output, *self.session.vision.looks(again, pixels)]
        finally:
            self._again = False

    def _pixels(self) -> Tensor:
        args, kwargs = self._calls["tower"]
        found: Tensor = args[0] if args else kwargs["pixel_values"]
        return found

    def _encode(self, tokens: int, pixels: Tensor) -> Tensor:
        """Tower, Q-Former and projection once more, as they were called, for these pixels."""
        model = self.family.outer
        args, kwargs = self._calls["tower"]
        kwargs = {**kwargs, "pixel_values": pixels, "return_dict": True}
        states = model.vision_model(**kwargs).last_hidden_state
        args, kwargs = self._calls["qformer"]
        queries = model.qformer(*args, **{**kwargs, "encoder_hidden_states": states, "return_dict": True})
        found: Tensor = model.language_projection(queries.last_hidden_state[:, :tokens].to(states.dtype))
        return found

    def row_embeddings(self, embeds: Tensor, image: Tensor, rows: list[int | None]) -> Tensor:
        """Embeddings [B*R, T, hidden] of prompts [B, T, hidden], each row with the features of its own look.

        Args:
            embeds: embeddings with the plain features in place; image: Bool[B, T] of image tokens.
            rows: the look of each row of a prompt, None for one that loses its image tokens later.
        """
        copies = embeds.shape[0] // max(1, self.looks[0].shape[0]) if self.looks else 1  # beams repeat the prompts
        wide = []
        for look in rows:
            if not look:
                wide.append(embeds)
            else:
                features = self.looks[look].repeat_interleave(copies, dim=0).to(embeds.dtype)
                wide.append(embeds.masked_scatter(image[..., None], features))
        return torch.stack(wide, dim=1).flatten(0, 1)
