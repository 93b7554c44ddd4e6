"""A method that acts on some prompts of a batch only, so that the others are the plain model's.

One batch can then hold the same prompt with and without a method, token for token in step. A confined method is of a
class derived from the method's own: every answer is inherited, and only those that carry edits name the batch rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfix.errors import ConflictError
from mmfix.families import Family
from mmfix.method import Method, Site
from mmfix.mixing import Mix
from mmfix.segments import MaskEdit
from mmfix.spans import TokenSpans
from mmfix_kernels import (
    Edit,
    HeadMean,
    HeadScale,
    HeadSelect,
    KeyGain,
    KeyMove,
    MapReplacement,
    MassMove,
    ScoreEdit,
    SplitSoftmax,
)

# The answers that this module knows how to confine, or that change nothing by themselves. A method that gives another
# answer is refused: half of it would act on every prompt.
KNOWN = frozenset(
    {
        *("prepare", "edits", "mask", "masks", "answer_marker", "wants_sinks", "sinks", "wants_heads", "head_scale"),
        *("scales_text_only", "branches", "readouts", "mix", "positions", "rewrites_positions"),
        *("wants_received", "received", "tower_layers", "patches", "patch_edits"),
        *("tells_pictures_apart", "counts_patches"),
    }
)


class _Confined:
    """Mixed in before a method's class."""

    _prompts: tuple[bool, ...]

    def prepare(self, family: Family) -> Method:
        prepared: Method = super().prepare(family)  # type: ignore[misc]
        return _derive(prepared, self._prompts)

    def edits(self, site: Site) -> Sequence[Edit]:
        found: Sequence[Edit] = super().edits(site)  # type: ignore[misc]
        return [_restricted(edit, self._rows(site)) for edit in found]

    def received(self, site: Site, mass: Tensor) -> Sequence[Edit]:
        found: Sequence[Edit] = super().received(site, mass)  # type: ignore[misc]
        return [_restricted(edit, self._rows(site)) for edit in found]

    def patch_edits(self, site: Site, values: Tensor) -> Sequence[Edit]:
        found: Sequence[Edit] = super().patch_edits(site, values)  # type: ignore[misc]
        return [_restricted(edit, self._rows(site)) for edit in found]

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        found: Sequence[MaskEdit] = super().mask(site)  # type: ignore[misc]
        chosen = self._rows(site)
        return [dataclasses.replace(e, batch=chosen if e.batch is None else chosen & e.batch) for e in found]

    @property
    def masks(self) -> bool:
        return type(self).__mro__[2].mask is not Method.mask  # type: ignore[attr-defined]

    def positions(self, spans: TokenSpans) -> Tensor:
        found: Tensor = super().positions(spans)  # type: ignore[misc]
        return torch.where(self._of(spans)[:, None], found, (spans.valid.long().cumsum(-1) - 1).clamp(min=0))

    @property
    def rewrites_positions(self) -> bool:
        return type(self).__mro__[2].positions is not Method.positions  # type: ignore[attr-defined]

    def _rows(self, site: Site) -> Tensor:
        return self._of(site.spans)

    def _of(self, spans: TokenSpans) -> Tensor:
        """Bool[rows] of the batch at hand, branches included."""
        chosen = torch.tensor(self._prompts, device=spans.image.device)
        return chosen.repeat_interleave(spans.image.shape[0] // len(self._prompts))

    def head_scale(self, site: Site, heads: Tensor, text_only: Tensor) -> HeadScale:
        edit: HeadScale = super().head_scale(site, heads, text_only)  # type: ignore[misc]
        count = heads.shape[0] // len(self._prompts)
        chosen = torch.tensor(self._prompts, device=heads.device).repeat_interleave(count)
        return HeadScale(scale=torch.where(chosen[:, None], edit.scale, 1.0))

    def mix(self) -> Mix | None:
        found: Mix | None = super().mix()  # type: ignore[misc]
        if found is None:
            return None
        cls: Any = type(type(found).__name__, (_ConfinedMix, type(found)), {})
        confined = object.__new__(cls)
        confined.__dict__.update(found.__dict__, prompts=self._prompts)
        return confined  # type: ignore[no-any-return]


class _ConfinedMix:
    """Mixed in before a mix's class: logits of some prompts are mixed, the others keep their factual ones."""

    prompts: tuple[bool, ...]

    def __call__(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        chosen = torch.tensor(self.prompts, device=logits.device)
        mixed: Tensor = super().__call__(logits, steps)  # type: ignore[misc]
        return torch.where(chosen[:, None, None], mixed, logits[:, 0])


def confine(method: Method, prompts: Sequence[bool]) -> Method:
    """`method`, acting only on the prompts of a batch that are True.

    Args:
        method: any method whose answers are edits, head factors and mixed logits.
        prompts: one per prompt of the batches that will be run; no beams and no several sequences per prompt.

    Raises:
        ConflictError: the method also gives an answer that cannot be confined.
    """
    known = {name for name in dir(Method) if not name.startswith("_")}
    changed = [name for name in sorted(known - KNOWN - {"info", "check"}) if _overrides(type(method), name)]
    if changed:
        raise ConflictError(
            f"method {method.info.name!r} answers {', '.join(changed)}, which acts on the whole batch; run the plain "
            "model and the method one after the other"
        )
    return _derive(method, tuple(bool(p) for p in prompts))


def _overrides(cls: type[Method], name: str) -> bool:
    return getattr(cls, name, None) is not getattr(Method, name, None)


def _derive(method: Method, prompts: tuple[bool, ...]) -> Method:
    plain = type(method)
    cls: Any = plain if issubclass(plain, _Confined) else type(plain.__name__, (_Confined, plain), {})
    confined = object.__new__(cls)
    confined.__dict__.update(method.__dict__, _prompts=prompts)
    return confined  # type: ignore[no-any-return]


def _restricted(edit: Edit, chosen: Tensor) -> Edit:
    """`edit` on the batch rows of `chosen`, Bool[rows]."""
    if isinstance(edit, HeadScale):
        return HeadScale(scale=torch.where(chosen[:, None], edit.scale.to(chosen.device), 1.0))
    if isinstance(edit, (KeyGain, KeyMove, HeadMean)):
        return edit.of(chosen)
    if isinstance(edit, (ScoreEdit, SplitSoftmax, MassMove, MapReplacement, HeadSelect)):
        return dataclasses.replace(edit, batch=chosen if edit.batch is None else chosen & edit.batch)
    raise ConflictError(
        f"{type(edit).__name__} acts on the whole batch; run the plain model and the method one after the other"
    )
