"""Inputs of a forward pass expanded to one row per branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmfix.branches import Branch, CacheRows, Rows, drop_image
from mmfix.errors import MmfixError
from mmfix.families import Family
from mmfix.spans import padding_mask
from mmfix.vision import Vision
from mmfix_kernels import MapReplacement

_PER_ROW = ("token_type_ids", "mm_token_type_ids")


class Expander:
    """Expands what ``generate()`` passes, remembers the prompts of the rows, and undoes what it did to caches."""

    def __init__(self, family: Family, branches: tuple[Branch, ...], vision: Vision) -> None:
        self.family = family
        self.rows = Rows(branches)
        self.vision = vision
        self.image = torch.zeros(0, 0, dtype=torch.bool)  # Bool[B*R, T], image tokens of the rows' prompts
        self.valid = torch.zeros(0, 0, dtype=torch.bool)
        self.caches: list[CacheRows] = []

    def expand(
        self, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], image_mask: Tensor | None, length: int
    ) -> dict[str, Any]:
        """Keyword arguments for B*R rows from those for B prompts; `length` tokens of a first pass are the prompt."""
        if len(args) > 1 or ids is None:
            raise MmfixError(
                "methods with branches need input_ids by keyword (or first) and everything else by keyword; "
                "call generate(), or model(input_ids=…, …)"
            )
        kwargs = {**kwargs, "input_ids": ids}
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        kwargs = self._prompt(ids, kwargs, image_mask, length) if past == 0 else self._step(ids, kwargs, past)
        for name in _PER_ROW:
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = self.rows.expand(kwargs[name])
        if cache is not None and not any(known.cache is cache for known in self.caches):
            self.caches.append(CacheRows(cache, self.rows.count))
        return kwargs

    def _prompt(self, ids: Tensor, kwargs: dict[str, Any], mask: Tensor | None, length: int) -> dict[str, Any]:
        batch, total = ids.shape
        image = ids == self.family.image_token_id if mask is None else mask.to(ids.device)
        valid = padding_mask(kwargs.get("attention_mask"), ids)
        if kwargs.get("pixel_values") is not None:
            kwargs = self.vision.encode(kwargs)
        if (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None:
            kwargs["mm_encoder_outputs"] = self.vision.take_apart(kwargs["mm_encoder_outputs"], image & valid)
        wide_ids, wide_valid, wide_image = (self.rows.expand(x) for x in (ids, valid, image))
        gone = self.rows.without_image(batch, ids.device)
        pad = getattr(self.family.decoder.config, "pad_token_id", None)
        pad = 0 if pad is None or pad < 0 or pad == self.family.image_token_id else int(pad)
        wide_ids, valid = drop_image(wide_ids, wide_valid, wide_image, gone, pad)
        self.valid = valid[:, :length]
        self.image = wide_image & ~gone[:, None]
        kwargs["input_ids"] = wide_ids
        self._masks(kwargs, valid, 0, total)
        return kwargs

    def _step(self, ids: Tensor, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        batch, new = ids.shape
        if self.valid.shape[0] != batch * self.rows.count:
            raise MmfixError(
                f"the prompt had {self.valid.shape[0] // self.rows.count} rows and this step has {batch}; "
                "start a new generate() call"
            )
        kwargs["input_ids"] = self.rows.expand(ids)
        grown = torch.ones(self.valid.shape[0], past + new - self.valid.shape[1], dtype=torch.bool, device=ids.device)
        self._masks(kwargs, torch.cat([self.valid, grown], dim=1), past, new)
        return kwargs

    def _masks(self, kwargs: dict[str, Any], valid: Tensor, past: int, new: int) -> None:
        """Attention mask and positions of the rows; those of rows whose prompt changed are made anew."""
        mask = kwargs.get("attention_mask")
        changed = any(not branch.image for branch in self.rows.branches)
        if isinstance(mask, dict):
            kwargs["attention_mask"] = {k: None if m is None else self._wide_mask(m, valid) for k, m in mask.items()}
        elif mask is not None and mask.ndim == 4:
            kwargs["attention_mask"] = self._wide_mask(mask, valid)
        elif mask is not None or changed:
            kwargs["attention_mask"] = valid.long()
        positions = kwargs.get("position_ids")
        if positions is not None:
            positions = self.rows.expand(positions, dim=1 if positions.ndim == 3 else 0)
        if changed:
            if positions is not None and positions.ndim == 3:
                raise MmfixError(
                    f"{type(self.family.model).__name__} uses multi-axis positions, for which a branch without the "
                    "image is not built yet; use a method without such a branch"
                )
            own = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + new]
            gone = self.rows.without_image(valid.shape[0] // self.rows.count, valid.device)
            positions = own if positions is None else torch.where(gone[:, None], own, positions)
        if positions is not None:
            kwargs["position_ids"] = positions

    def _wide_mask(self, mask: Tensor, valid: Tensor) -> Tensor:
        """A 4-D mask for the rows; a row without the image also hides the freed places."""
        wide = self.rows.expand(mask)
        gone = self.rows.without_image(mask.shape[0], mask.device)
        if not bool(gone.any()):
            return wide
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

    def map_edits(self, layer: int) -> list[MapReplacement]:
        """Map replacements of one language layer, each for the rows of its branch."""
        batch = self.valid.shape[0] // self.rows.count
        return [
            dataclasses.replace(branch.maps, batch=self.rows.of(number, batch, self.valid.device))
            for number, branch in enumerate(self.rows.branches, start=1)
            if branch.maps is not None and layer in branch.layers
        ]

    def restore(self) -> None:
        """Give caches their own batch operations back."""
        for cache in self.caches:
            cache.restore()
        self.caches.clear()
