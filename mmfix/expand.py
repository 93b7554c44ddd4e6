"""Inputs of a forward pass expanded to one row per branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix.branches import Branch
from mmfix.branchrows import CacheRows, Rows
from mmfix.conversation import image_tokens
from mmfix.errors import MmfixError
from mmfix.families import Family
from mmfix.inputs import Inputs
from mmfix.outer import Outer
from mmfix.prompts import Rewrite, drop_image
from mmfix.selection import Blind, Overlooked
from mmfix.spans import padding_mask
from mmfix.vision import Vision
from mmfix_kernels import Edit, HeadMean, HeadScale, KeyGain, KeyMove

_PER_ROW = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")


class Expander:
    """Expands what ``generate()`` passes, remembers the prompts of the rows, and undoes what it did to caches."""

    def __init__(
        self,
        family: Family,
        branches: tuple[Branch, ...],
        vision: Vision,
        rewrite: Rewrite | None = None,
    ) -> None:
        """`rewrite`: what is made of the factual prompts."""
        self.family = family
        self.rows = Rows(branches)
        self.rewrite = rewrite
        self.vision = vision
        self.outer: Outer | None = None  # of a model whose own generate() encodes the picture
        self.image = torch.zeros(0, 0, dtype=torch.bool)  # Bool[B*R, T], image tokens of the rows' prompts
        self.valid = torch.zeros(0, 0, dtype=torch.bool)
        self.given_image = self.image  # Bool[B, L], of the piece as it was given
        self.longer = 0  # tokens by which the rows' prompts are longer than the factual ones
        self.maps: Tensor | None = None  # Float32[B, layers, T], where the last row of each prompt looks
        self.caches: list[CacheRows] = []

    def expand(
        self,
        given: Inputs,
        kwargs: dict[str, Any],
        image_mask: Tensor | None,
        length: int,
        prompt: bool,
        start: int = 0,
    ) -> dict[str, Any]:
        """Keyword arguments for B*R rows from those for B prompts.

        Args:
            length: tokens of the pass that are the prompt's (what follows are guesses of assisted decoding).
            prompt: whether this is a prompt or a further piece of one, and not generated tokens.
            start: prompt tokens that were computed for all rows already; pictures' features are those after them.
        """
        kwargs = self._prompt(given, kwargs, image_mask, length, start) if prompt else self._step(given, kwargs)
        for name in _PER_ROW:
            given_types = kwargs.get(name)
            if not isinstance(given_types, Tensor):
                continue
            if given_types.shape[0] != self.valid.shape[0] or (self.rewrite is not None and prompt):
                kwargs[name] = self._types(kwargs[name], prompt)
        cache = given.cache
        self.caches = [known for known in self.caches if known.cache is not None]
        if cache is not None and not any(known.cache is cache for known in self.caches):
            self.caches.append(CacheRows(cache, self.rows.count, self.longer))
        return kwargs

    def _prompt(
        self, given: Inputs, kwargs: dict[str, Any], mask: Tensor | None, length: int, start: int
    ) -> dict[str, Any]:
        batch, total = given.like.shape[:2]
        image = image_tokens(given.ids, given.like.shape[:2], self.family.image_token_id, mask)
        valid = _piece_mask(kwargs.get("attention_mask"), given, total)
        self.given_image = image & valid
        blank = self._blank(self.given_image, given.past)
        kwargs, kept = self._features(given, kwargs, self.given_image[:, start:], _from(blank, start))
        wide_image, wide_valid = self.rows.expand(image), self.rows.expand(valid)
        left = wide_image & self.rows.without_image(batch, image.device)[:, None]  # tokens that leave the prompts
        if kept is not None:
            left[:, start:] |= wide_image[:, start:] & ~kept
        gone = left.any(-1)
        self.longer = 0
        if given.ids is None:
            assert given.embeds is not None
            if self.other_prompts:
                raise MmfixError(
                    "the prompt came as inputs_embeds, and other token ids are to be put into it; pass input_ids"
                )
            embeds = self.rows.expand(given.embeds)
            if self.outer is not None:
                embeds = self.outer.row_embeddings(given.embeds, image & valid, self.vision.row_looks)
            if blank is not None:
                embeds = embeds.masked_fill(blank[..., None], 0.0)
            kwargs["inputs_embeds"], wide_valid = drop_image(embeds, wide_valid, left, gone, 0)
            wide_image = wide_image & ~left
        else:
            ids = self.rows.expand(given.ids)
            wide_image = drop_image(wide_image, wide_valid, left, gone, 0)[0]
            ids, wide_valid = drop_image(ids, wide_valid, left, gone, self._filler())
            if self.other_prompts:
                ids, wide_valid, wide_image = self._other_prompts(given, ids, wide_valid, wide_image, length, total)
            kwargs["input_ids"] = ids
        length += self.longer
        if given.past:
            old_valid, old_image = self._before(given.past, batch)
            whole, wide_image = torch.cat([old_valid, wide_valid], 1), torch.cat([old_image, wide_image], 1)
        else:
            whole = wide_valid
        self.valid, self.image = whole[:, : given.past + length], wide_image[:, : given.past + length]
        self._masks(kwargs, whole, given.past, total + self.longer)
        return kwargs

    @property
    def measures(self) -> bool:
        """Whether some branch needs a pass ahead that tells where the prompt's last row looks."""
        return any(isinstance(branch.select, Blind) for branch in self.rows.branches)

    @property
    def chooses(self) -> bool:
        """Whether some branch depends on where the prompt's last row looks."""
        return any(isinstance(branch.select, (Blind, Overlooked)) for branch in self.rows.branches)

    def _blank(self, image: Tensor, past: int) -> Tensor | None:
        """Bool[B*R, T]: image tokens of the rows whose features are zero; None for none."""
        if not self.measures or (past and not bool(image.any())):
            return None
        if past or self.maps is None:
            raise MmfixError(
                "a picture came after the first pass of its prompt, and a branch's view of it depends on the prompt's "
                "last row, so pieces cannot be joined; give the conversation at once, with a fresh cache"
            )
        known = self.maps.shape[-1]
        rows = [torch.zeros_like(image)]
        for branch in self.rows.branches:
            if isinstance(branch.select, Blind):
                kept = branch.select(self.maps, image[:, :known])
                rows.append(image & ~F.pad(kept, (0, image.shape[1] - known)))
            else:
                rows.append(torch.zeros_like(image))
        return torch.stack(rows, dim=1).flatten(0, 1)

    def _features(
        self, given: Inputs, kwargs: dict[str, Any], image: Tensor, blank: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Encode pixels, and give every row the features of its branch.

        Also Bool[B*R, T], the image tokens that each row keeps; None when that is all of those that it has.
        """
        kept = None
        if kwargs.get("pixel_values") is not None:
            kwargs = self.vision.encode(kwargs)
        if (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None:
            kept = self.vision.kept(kwargs["mm_encoder_outputs"], image)
            kwargs["mm_encoder_outputs"] = self.vision.take_apart(kwargs["mm_encoder_outputs"], image, kept, blank)
        elif given.ids is None and self.vision.needed and self.outer is None:
            raise MmfixError(
                "the image's features are already merged into inputs_embeds, so a branch cannot look at the picture "
                "anew; pass input_ids and pixel_values, or use a method that edits the language model only"
            )
        return kwargs, kept

    def _filler(self) -> int:
        pad = getattr(self.family.decoder.config, "pad_token_id", None)
        return 0 if pad is None or pad < 0 or pad == self.family.image_token_id else int(pad)

    def _other_prompts(
        self, given: Inputs, ids: Tensor, valid: Tensor, image: Tensor, length: int, total: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose prompt is changed, all padded on the left to one width.

        Padding on the right of a prompt stays there, and so do guesses after it.
        """
        if given.past:
            raise MmfixError("other tokens cannot be put into a prompt that comes in pieces; give the prompt at once")
        prompts: list[tuple[Tensor, Tensor]] = []
        for row in range(ids.shape[0]):
            branch = row % self.rows.count
            edit = self.rows.branches[branch - 1].prompt if branch else self.rewrite
            real = valid[row, :length]
            own, own_image = ids[row, :length][real], image[row, :length][real]
            prompts.append((own, own_image) if edit is None else edit(own, own_image))
        places = torch.arange(1, length + 1, device=valid.device)
        after: list[int] = (length - torch.where(valid[:, :length], places, 0).amax(-1)).tolist()
        width = max(length, *(len(own) + right for (own, _), right in zip(prompts, after, strict=True)))
        self.longer = width - length
        if self.longer and getattr(given.cache, "is_compileable", False):
            raise MmfixError(
                f"a prompt with other tokens is {self.longer} tokens longer than the one generate() made its "
                "fixed-size cache for; use the default cache, or a shorter prompt"
            )
        new_ids = ids.new_full((ids.shape[0], width), self._filler())
        new_valid = torch.zeros_like(new_ids, dtype=torch.bool)
        new_image = torch.zeros_like(new_valid)
        for row, (own, own_image) in enumerate(prompts):
            place = slice(width - after[row] - len(own), width - after[row])
            new_ids[row, place], new_valid[row, place], new_image[row, place] = own, True, own_image
        tail = slice(length, total)
        return (
            torch.cat([new_ids, ids[:, tail]], dim=1),
            torch.cat([new_valid, valid[:, tail]], dim=1),
            torch.cat([new_image, image[:, tail]], dim=1),
        )

    def _before(self, past: int, batch: int) -> tuple[Tensor, Tensor]:
        """Validity and image tokens of the `past` tokens in the cache."""
        self._same_rows(batch)
        missing = max(0, past - self.valid.shape[1])
        return F.pad(self.valid[:, :past], (0, missing), value=True), F.pad(self.image[:, :past], (0, missing))

    def _same_rows(self, batch: int) -> None:
        if self.valid.shape[0] != batch * self.rows.count:
            raise MmfixError(
                f"the prompt had {self.valid.shape[0] // self.rows.count} rows and this step has {batch}; "
                "start a new generate() call"
            )

    def _step(self, given: Inputs, kwargs: dict[str, Any]) -> dict[str, Any]:
        batch, new = given.like.shape[:2]
        self._same_rows(batch)
        if given.ids is not None:
            kwargs["input_ids"] = self.rows.expand(given.ids)
        else:
            kwargs["inputs_embeds"] = self.rows.expand(given.like)
        missing = max(0, given.past + new - self.valid.shape[1])
        valid = F.pad(self.valid[:, : given.past + new], (0, missing), value=True)
        self._masks(kwargs, valid, given.past, new)
        return kwargs

    def _types(self, types: Tensor, prompt: bool) -> Tensor:
        """Token types of the rows; a row without the image, or with another prompt, has those of its own tokens."""
        wide = self.rows.expand(types)
        if not prompt or types.ndim > 2:
            return wide
        wide = F.pad(wide, (self.longer, 0))
        image = F.pad(self.image[:, -wide.shape[1] :], (0, max(0, wide.shape[1] - self.image.shape[1])))
        if not bool(self.changed.any()):
            return wide
        # 1 as a rule, 0 for a model whose types mean prompt and answer.
        marked = types[self.given_image[:, -types.shape[1] :]]
        return torch.where(image, marked.amax() if len(marked) else 0, torch.zeros_like(wide))

    def _masks(self, kwargs: dict[str, Any], valid: Tensor, past: int, new: int) -> None:
        """Attention mask and positions of the rows; those of rows whose prompt changed are made anew."""
        mask = kwargs.get("attention_mask")
        changed = self.changed.to(valid.device)
        if isinstance(mask, dict):
            wide = {k: None if m is None else self._wide_mask(m, valid, changed) for k, m in mask.items()}
            kwargs["attention_mask"] = wide
        elif mask is not None and mask.ndim == 4:
            kwargs["attention_mask"] = self._wide_mask(mask, valid, changed)
        elif mask is not None or bool(changed.any()):
            kwargs["attention_mask"] = valid.long()
        positions = kwargs.get("position_ids")
        if positions is not None:
            positions = self.rows.expand(positions, dim=positions.ndim - 2)
            positions = F.pad(positions, (new - positions.shape[-1], 0))
        if bool(changed.any()):
            own = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + new]
            rows = changed.repeat(valid.shape[0] // self.rows.count)
            unnumbered = self.rewrite is not None or any(b.rewrites and b.image for b in self.rows.branches)
            if positions is not None and positions.ndim == 3 and unnumbered:
                raise MmfixError(
                    f"{self.family.name} numbers image tokens along several axes, and "
                    "another prompt around the image is not built for that; use a method that leaves prompts alone"
                )
            # Text alone has the same number on every axis.
            positions = own if positions is None else torch.where(rows[:, None], own, positions)
        if positions is not None:
            kwargs["position_ids"] = positions

    @property
    def other_prompts(self) -> bool:
        """Whether some row's prompt holds other tokens than the one given."""
        return self.rewrite is not None or any(branch.prompt is not None for branch in self.rows.branches)

    @property
    def changed(self) -> Tensor:
        """Bool[R]: the rows of a prompt whose tokens are not the factual ones."""
        return torch.tensor([self.rewrite is not None, *(b.rewrites for b in self.rows.branches)])

    def _wide_mask(self, mask: Tensor, valid: Tensor, changed: Tensor) -> Tensor:
        """A 4-D mask for the rows; those of `changed` branches, whose tokens stand elsewhere, show their own."""
        if self.longer:
            raise MmfixError("a branch with another prompt needs a 2-D attention mask; call generate(), or pass one")
        wide = self.rows.expand(mask)
        if not bool(changed.any()):
            return wide
        gone = changed.to(mask.device).repeat(mask.shape[0])
        hidden = torch.zeros(wide.shape[0], wide.shape[-1], dtype=torch.bool, device=mask.device)
        hidden[:, : valid.shape[1]] = ~valid & gone[:, None]
        shown = torch.zeros_like(hidden)
        shown[:, : valid.shape[1]] = valid & gone[:, None]
        rows, width = wide.shape[-2], wide.shape[-1]
        offset = valid.shape[1] - rows
        causal = (
            torch.arange(width, device=mask.device)[None] <= torch.arange(rows, device=mask.device)[:, None] + offset
        )
        low = False if wide.dtype == torch.bool else torch.finfo(wide.dtype).min
        high = True if wide.dtype == torch.bool else 0.0
        wide = torch.where(shown[:, None, None, :] & causal, torch.full_like(wide, high), wide)
        return wide.masked_fill(hidden[:, None, None, :], low)

    def edits(self, layer: int) -> list[Edit]:
        """Edits of one language layer, each for the rows of its branch."""
        batch = self.valid.shape[0] // self.rows.count
        found: list[Edit] = []
        for number, branch in enumerate(self.rows.branches, start=1):
            if branch.layers is not None and layer not in branch.layers:
                continue
            chosen = self.rows.of(number, batch, self.valid.device)
            for edit in branch.edits:
                if isinstance(edit, HeadScale):
                    scale = torch.where(chosen[:, None], edit.scale.to(chosen.device), 1.0)
                    found.append(HeadScale(scale=scale))
                elif isinstance(edit, (KeyGain, KeyMove, HeadMean)):
                    found.append(edit.of(chosen))
                else:
                    found.append(dataclasses.replace(edit, batch=chosen))
        return found

    def restore(self) -> None:
        """Give caches their own batch operations back, and leave in them the factual rows alone."""
        for cache in self.caches:
            cache.restore()
        self.caches.clear()
        self.maps = None
        self.image = self.valid = torch.zeros(0, 0, dtype=torch.bool)


def _from(tensor: Tensor | None, start: int) -> Tensor | None:
    return None if tensor is None else tensor[:, start:]


def _piece_mask(attention_mask: Any, given: Inputs, new: int) -> Tensor:
    """Bool[B, new]: which tokens of the pass are not padding."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -new:].to(given.like.device).bool()
    like = given.like.new_empty(given.like.shape[0], given.past + new)
    return padding_mask(attention_mask, like)[:, -new:]
