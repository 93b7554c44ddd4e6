"""Image features for every branch: the picture is encoded once per different look at it.

``generate()`` encodes images before the model's first forward pass, so pixels are caught where they are encoded: the
model's ``get_image_features``. Its result carries the features of every branch side by side in the last axis, which
survives whatever ``generate()`` does to the list of images (beams, several sequences), and is taken apart when the rows
are expanded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfix.branches import Branch, VisionEdit
from mmfix.errors import UnsupportedModel
from mmfix.families import Family
from mmfix_kernels import AttentionCall, KeyGroups, Label, MapReplacement, grouped_attention
from mmfix_kernels.maps import counter_uniform


class TowerState:
    """What one attention module of the vision tower needs during a mitigation."""

    def __init__(self, layer: int, vision: Vision) -> None:
        self.layer = layer
        self.vision = vision

    def prefix(self) -> None:
        """Towers keep no keys."""

    def attend(self, inputs: dict[str, Any], window: int | None) -> tuple[Tensor, None]:
        """One attention call of the vision tower."""
        return self.vision.attend(self, inputs)


class Vision:
    """The vision side of a session."""

    def __init__(self, family: Family, branches: tuple[Branch, ...], backend: str | None) -> None:
        self.family = family
        self.branches = branches
        self.backend = backend
        self.editing: VisionEdit | None = None  # the look that the tower is taking now
        self.captured: Tensor | None = None  # [B, H, N, N], the map that the release variant uses
        self.original: Any = None

    @property
    def needed(self) -> bool:
        return any(branch.looks for branch in self.branches)

    @property
    def edits_tower(self) -> bool:
        """Whether some branch changes the tower itself, not only the picture."""
        return any(branch.vision is not None for branch in self.branches)

    def wrapped(self, original: Any) -> Any:
        """``get_image_features`` whose image features hold all branches, [N, (1 + edits) * hidden] per image."""
        self.original = original

        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if self.editing is not None or not hasattr(output, "pooler_output"):
                return output
            looks = [list(output.pooler_output)]
            for branch in self.branches:
                if branch.looks:
                    looks.append(self._look(branch, original, args, kwargs))
            packed = [torch.cat(parts, dim=-1) for parts in zip(*looks, strict=True)]
            output.pooler_output = packed if isinstance(output.pooler_output, (list, tuple)) else torch.stack(packed)
            return output

        return get_image_features

    def _look(self, branch: Branch, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if branch.pixels is not None:
            name = next(iter(inspect.signature(original).parameters))
            if args:
                args = (branch.pixels(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, name: branch.pixels(kwargs[name])}
        edit = branch.vision
        if edit is None:
            return list(original(*args, **kwargs).pooler_output)
        self.editing, self.captured = edit, None
        projector = _projector(self.family) if edit.variant == "release" else None
        handle = projector.register_forward_pre_hook(self._scale_features) if projector is not None else None
        try:
            return list(original(*args, **kwargs).pooler_output)
        finally:
            self.editing = None
            if handle is not None:
                handle.remove()

    def attend(self, state: TowerState, inputs: dict[str, Any]) -> tuple[Tensor, None]:
        """One attention call of the vision tower."""
        edit = self.editing
        layers = len(self.family.tower_attentions)
        if edit is None or not any(state.layer == layer % layers for layer in edit.layers):
            return grouped_attention(AttentionCall(**inputs), self.backend).output.transpose(1, 2).contiguous(), None
        key = inputs["key"]
        labels = torch.full((key.shape[0], key.shape[2]), int(Label.IMAGE), dtype=torch.int8, device=key.device)
        groups = KeyGroups.plain(labels)
        if edit.variant == "release":
            identity = torch.eye(key.shape[2], device=key.device, dtype=torch.float32)
            whole = {name: value.float() for name, value in inputs.items() if name in ("query", "key")}
            values = identity.expand(*key.shape[:2], *identity.shape)
            self.captured = grouped_attention(AttentionCall(**{**inputs, **whole, "value": values})).output
            edits: list[MapReplacement] = []
        else:
            edits = [edit.maps]
        call = AttentionCall(**inputs, groups=groups, edits=edits)
        return grouped_attention(call, self.backend).output.transpose(1, 2).contiguous(), None

    def _scale_features(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Multiply the features that enter the projector by the released code's weights."""
        assert self.captured is not None
        assert self.editing is not None
        features = args[0]
        weights = release_weights(release_map(self.editing.maps, self.captured), features.shape[1])
        return (features * weights[..., None].to(features.dtype), *args[1:])

    def take_apart(self, outputs: dict[str, Any], image: Tensor) -> dict[str, Any]:
        """Image features for expanded rows.

        Args:
            outputs: ``mm_encoder_outputs`` with packed features.
            image: Bool[B, T], image tokens of the prompts.

        Returns:
            A copy whose images follow the rows ``b*R + r``; rows without an image have none.
        """
        found = copy.copy(outputs["image"])
        features = found.pooler_output
        listed = isinstance(features, (list, tuple))
        flat = torch.cat(list(features)) if listed else features.reshape(-1, features.shape[-1])
        counts = image.sum(-1).tolist()
        if sum(counts) != flat.shape[0]:
            raise UnsupportedModel(
                f"the prompts have {sum(counts)} image tokens and their pictures give {flat.shape[0]} features; the "
                "processor and the model disagree"
            )
        looks = flat.chunk(1 + sum(b.looks for b in self.branches), dim=-1)
        rows: list[Tensor] = []
        for start, count in zip(itertools.accumulate([0, *counts]), counts, strict=False):
            place = 0
            rows.append(looks[0][start : start + count])
            for branch in self.branches:
                place += branch.looks
                if branch.image:
                    rows.append(looks[place if branch.looks else 0][start : start + count])
        found.pooler_output = rows if listed else torch.cat(rows)
        return {**outputs, "image": found}

    def encode(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a forward pass with pixels turned into ``mm_encoder_outputs``."""
        base = self.family.model.base_model
        if "mm_encoder_outputs" not in inspect.signature(self.family.model.forward).parameters:
            raise UnsupportedModel(
                f"{type(self.family.model).__name__}.forward takes no mm_encoder_outputs, so branches cannot share the "
                "encoded picture; update transformers"
            )
        wanted = [name for name in inspect.signature(base.get_image_features).parameters if name in kwargs]
        given = {name: kwargs[name] for name in wanted if name != "kwargs"}
        rest = {name: value for name, value in kwargs.items() if name not in given}
        outputs = dict(kwargs.get("mm_encoder_outputs") or {})
        if given.get("pixel_values") is not None:
            outputs["image"] = base.get_image_features(**given, return_dict=True)
        return {**rest, "mm_encoder_outputs": outputs}


def _projector(family: Family) -> nn.Module:
    for name in ("multi_modal_projector", "connector", "projector"):
        found = getattr(family.model.base_model, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModel(
        f"{type(family.model).__name__} has no projector between tower and language model that mmfix knows, which "
        "the release variant multiplies; use variant='paper'"
    )


def release_map(edit: MapReplacement, attention: Tensor) -> Tensor:
    """The released code's edit of one post-softmax tower map [B, H, N, N] (CausalMM, cf_encoder).

    random: ``2*U(0,1)``; uniform: the mean per head; reversed: the head's maximum minus the map; shuffled: all entries
    of a head permuted, in one permutation shared by the batch.
    """
    b, h, n, _ = attention.shape
    counter = torch.arange(n * n, device=attention.device)
    if edit.kind == "random":
        r = counter_uniform(edit.seed, torch.arange(h, device=attention.device)[:, None], counter * 0, counter)
        return (2 * r).view(1, h, n, n).expand(b, h, n, n)
    if edit.kind == "uniform":
        return attention.mean((-1, -2), keepdim=True).expand_as(attention)
    if edit.kind == "reversed":
        return attention.amax((-1, -2), keepdim=True) - attention
    order = counter_uniform(edit.seed, counter * 0, counter * 0, counter).argsort()
    return attention.flatten(2)[..., order].view_as(attention)


def release_weights(edited: Tensor, tokens: int) -> Tensor:
    """[B, tokens]: a map resized to the patch grid (bilinear) and averaged over heads, as the released code does.

    It treats the two axes of the map, query and key, as the two axes of the image; that is a defect of the release,
    reproduced here only under ``variant="release"``.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UnsupportedModel(
            f"{tokens} image features are not a square grid, which the release variant needs; use variant='paper'"
        )
    small = F.interpolate(edited.float(), size=(side, side), mode="bilinear", align_corners=False)
    return small.mean(1).flatten(1)
