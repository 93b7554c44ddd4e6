"""Image features for every branch: the picture is encoded once per different look at it.

``generate()`` encodes images before the model's first forward pass, so pixels are caught where they are encoded: the
model's ``get_image_features``. Its result carries the features of every branch side by side in the last axis, which
survives whatever ``generate()`` does to the list of images (beams, several sequences), and is taken apart when the rows
are expanded (:mod:`mmfix.features`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfix import features, tower
from mmfix.branches import Branch, VisionEdit
from mmfix.errors import UnsupportedModel
from mmfix.families import Family
from mmfix.relevance import Asked, KeepRelevant
from mmfix.scorers import Question
from mmfix.selection import Outliers
from mmfix.watch import TowerWatch
from mmfix_kernels import MapReplacement
from mmfix_kernels.maps import counter_uniform


class TowerState:
    """What one attention module of the vision tower (or of the resampler) needs during a mitigation."""

    def __init__(self, layer: int, vision: Vision, part: str = "tower") -> None:
        self.layer = layer
        self.vision = vision
        self.part = part

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
        self.inside: Callable[[], bool] = bool  # whether generate() is asking for features
        self.encoding = False  # whether this object is
        self.looking = False  # whether a look other than the plain one is being taken
        self.editing: VisionEdit | None = None  # its edit of the tower
        self.edited = 0  # attention calls changed in this look
        self.marking: Outliers | None = None  # what it marks instead of giving features
        self.watch: TowerWatch | None = None  # what methods see of the plain look
        self.asked: Asked | None = None  # the prompts of the call at hand
        self.captured: Tensor | None = None  # [B, H, N, N], the map that the release variant uses; [B, N] for marks

    @property
    def needed(self) -> bool:
        return any(branch.looks for branch in self.branches)

    @property
    def edits_tower(self) -> bool:
        """Whether some branch changes, or reads, the tower itself, not only the picture."""
        return bool(self.parts)

    @property
    def parts(self) -> set[str]:
        """Parts whose attention some branch edits or reads."""
        read = {"tower" for branch in self.branches if isinstance(branch.select, Outliers)}
        return read | {branch.vision.part for branch in self.branches if branch.vision is not None}

    @property
    def row_looks(self) -> list[int | None]:
        """For each row of a prompt, the look that it sees: 0 is the plain one, None is no picture."""
        rows: list[int | None] = [0]
        count = 0
        for branch in self.branches:
            count += branch.looks
            sees = branch.looks and not isinstance(branch.select, Outliers)  # whose look holds marks
            rows.append(count if sees else 0 if branch.image else None)
        return rows

    def wrapped(self, original: Any) -> Any:
        """``get_image_features`` whose image features hold all looks, side by side in the last axis."""
        names = list(inspect.signature(original).parameters)
        first = names[0]

        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            asked = self.encoding or self.inside()  # a user's own call gets what the model gives
            if self.looking or not asked or not hasattr(output, "pooler_output"):
                return output
            pixels, rest = (args[0], args[1:]) if args else (kwargs.pop(first), ())
            grids = {**dict(zip(names, args, strict=False)), **kwargs}.get("image_grid_thw")
            lengths = None if grids is None else grids.prod(-1).tolist()
            looks = self.looks(lambda changed: original(changed, *rest, **kwargs), pixels, lengths)
            return features.pack([output, *looks])

        return get_image_features

    def looks(self, encode: Callable[[Tensor], Any], pixels: Tensor, lengths: list[int] | None = None) -> list[Any]:
        """What `encode`, a pass of the tower over `pixels`, returns for each branch that looks anew.

        Args:
            lengths: of packed patches, how many every picture has.
        """
        looking = [branch for branch in self.branches if branch.looks]
        return [self._look(branch, encode, self._seen(branch, pixels, lengths)) for branch in looking]

    def _seen(self, branch: Branch, pixels: Tensor, lengths: list[int] | None) -> Tensor:
        """The picture of a branch."""
        if isinstance(branch.pixels, KeepRelevant):
            return branch.pixels(pixels, self._questions(pixels))
        return pixels if branch.pixels is None else branch.pixels(pixels, lengths)

    def _look(self, branch: Branch, encode: Callable[[Tensor], Any], pixels: Tensor) -> Any:
        edit = branch.vision
        self.marking = branch.select if isinstance(branch.select, Outliers) else None
        self.looking, self.editing, self.captured, self.edited = True, edit, None, 0
        handle = None
        if self.marking is not None:
            handle = _projector(self.family).register_forward_hook(self._mark_features)
        elif edit is not None and edit.variant == "release":
            handle = _projector(self.family).register_forward_pre_hook(self._scale_features)
        try:
            output = encode(pixels)
            if edit is not None and not self.edited:
                raise UnsupportedModel(
                    f"{self.family.name}: layers {edit.layers} of the {edit.part} never called an attention function "
                    "of transformers, so the picture would look the same; use a method that leaves the tower alone"
                )
            return output
        finally:
            self.looking, self.editing, self.marking = False, None, None
            if handle is not None:
                handle.remove()

    def ask(self, ids: Any, mask: Any) -> None:
        """Note the prompts [B, T] to which the pictures that come next belong; None where they are not known."""
        self.asked = None
        if isinstance(ids, Tensor) and ids.ndim == 2:
            plain = isinstance(mask, Tensor) and mask.shape == ids.shape
            valid = mask.bool() if plain else torch.ones_like(ids, dtype=torch.bool)
            self.asked = Asked(ids, valid, self.family.image_token_id, self.family.decode)

    def _questions(self, pixels: Tensor) -> list[Question]:
        if self.asked is None:
            raise UnsupportedModel(
                f"{self.family.name}: the picture is encoded where its prompt is not known, so nothing can be matched "
                "with it; give input_ids and pixel_values in one call, or use another method"
            )
        return self.asked.questions(pixels, self.family.name)

    def attend(self, state: TowerState, inputs: dict[str, Any]) -> tuple[Tensor, None]:
        """One attention call of the vision tower."""
        edit = self.editing
        if self.watch is not None and state.part == "tower" and not self.looking:
            self.watch.see(state.layer, inputs)
        layers = len(self.family.looking(state.part))
        if self.marking is not None and state.part == "tower" and state.layer == self.marking.layer % layers:
            self.captured = tower.cls_attention(inputs).mean(1)
        if edit is None or edit.part != state.part or not any(state.layer == layer % layers for layer in edit.layers):
            return tower.plain(inputs, self.backend).transpose(1, 2).contiguous(), None
        self.edited += 1
        if edit.variant == "release":
            self.captured = tower.attention_map(inputs)
            output = tower.plain(inputs, self.backend)
        else:
            output = tower.replaced(edit.maps, inputs, self.backend)
        return output.transpose(1, 2).contiguous(), None

    def _scale_features(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Multiply the features that enter the projector by the released code's weights."""
        assert self.editing is not None
        values = args[0]
        if self.captured is None or values.ndim != 3 or self.captured.shape[0] != values.shape[0]:
            raise UnsupportedModel(
                f"{self.family.name} packs pictures or windows, so there is no one map per picture, which the release "
                "variant needs; use variant='paper'"
            )
        weights = release_weights(release_map(self.editing.maps, self.captured), values.shape[1])
        return (values * weights[..., None].to(values.dtype), *args[1:])

    def _mark_features(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Marks in place of the features that leave the projector: they take the features' way to the prompt."""
        assert self.marking is not None
        if self.captured is None or output.ndim != 3 or output.shape[:2] != self.captured.shape:
            patches = "no attention" if self.captured is None else f"{tuple(self.captured.shape)} patches"
            raise UnsupportedModel(
                f"{self.family.name}: {patches} of the tower and features {tuple(output.shape)} for the language model "
                "do not match one to one, so tokens cannot be chosen by the tower's attention; use another method"
            )
        return self.marking(self.captured)[..., None].to(output.dtype).expand_as(output).contiguous()

    @property
    def _looks(self) -> int:
        """Looks that are packed side by side."""
        return 1 + sum(branch.looks for branch in self.branches)

    def kept(self, outputs: dict[str, Any], image: Tensor) -> Tensor | None:
        """Bool[B*R, T]: image tokens that the rows keep, from the marks among packed features; None for all.

        Args:
            image: Bool[B, T], image tokens of the prompts.
        """
        if not any(isinstance(branch.select, Outliers) for branch in self.branches):
            return None
        rows, look = [image], 0
        for branch in self.branches:
            look += branch.looks
            marks = isinstance(branch.select, Outliers)
            rows.append(features.marked(outputs["image"], image, self._looks, look) if marks else image)
        return torch.stack(rows, dim=1).flatten(0, 1)

    def take_apart(
        self, outputs: dict[str, Any], image: Tensor, kept: Tensor | None = None, blank: Tensor | None = None
    ) -> dict[str, Any]:
        """Image features for expanded rows.

        Args:
            outputs: ``mm_encoder_outputs`` with packed features.
            image: Bool[B, T], image tokens of the prompts.
            kept: Bool[B*R, T], those that stay in each row; None for all.
            blank: Bool[B*R, T], those whose features are zero; None for none.

        Returns:
            A copy whose images follow the rows ``b*R + r``; rows without an image have none.
        """
        found = features.take_apart(outputs["image"], image, self._looks, self.row_looks, kept, blank)
        return {**outputs, "image": found}

    def encode(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a forward pass with pixels turned into ``mm_encoder_outputs``.

        Positions that depend on the picture's grid (Qwen-VL) are computed here, since the grid goes with the pixels.
        """
        if self.family.cross_layers:
            return self._encode_crossed(kwargs)
        base = self.family.model.base_model
        known = inspect.signature(base.get_image_features).parameters
        passed = inspect.signature(base.forward).parameters  # sizes may go on under no name of their own
        wanted = [name for name in (*known, "image_sizes") if name in kwargs and (name in known or name in passed)]
        given = {name: kwargs[name] for name in wanted if name != "kwargs"}
        rest = {name: value for name, value in kwargs.items() if name not in given}
        if kwargs.get("position_ids") is None and hasattr(base, "compute_3d_position_ids"):
            asked = inspect.signature(base.compute_3d_position_ids).parameters
            rest["position_ids"] = base.compute_3d_position_ids(**{name: kwargs.get(name) for name in asked})
        outputs = dict(kwargs.get("mm_encoder_outputs") or {})
        if given.get("pixel_values") is not None:
            self.encoding = True
            try:
                outputs["image"] = base.get_image_features(**given, return_dict=True)
            finally:
                self.encoding = False
        return {**rest, "mm_encoder_outputs": outputs}

    def _encode_crossed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same for a model whose layers attend to the picture: its states, one batch row per row of the prompts."""
        base = self.family.model.base_model
        given = {name: kwargs[name] for name in ("aspect_ratio_ids", "aspect_ratio_mask")}
        pixels = kwargs["pixel_values"]

        def states(pixels: Tensor) -> Tensor:
            hidden = base.vision_model(pixel_values=pixels, **given).last_hidden_state
            projected: Tensor = base.multi_modal_projector(hidden)
            return projected.view(len(hidden), -1, hidden.shape[-2], base.hidden_size)

        found = [states(pixels), *self.looks(states, pixels)]
        rows = torch.stack([found[look or 0] for look in self.row_looks], dim=1)  # [B, R, tiles, patches, hidden]
        rest = {name: value for name, value in kwargs.items() if name not in (*given, "pixel_values")}
        return {**rest, "cross_attention_states": rows.flatten(0, 2)}


def _projector(family: Family) -> nn.Module:
    for name in ("multi_modal_projector", "connector", "projector"):
        found = getattr(family.model.base_model, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModel(
        f"{family.name} has no projector between tower and language model that mmfix knows, which "
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
