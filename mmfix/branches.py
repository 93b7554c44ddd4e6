"""Contrast branches: extra rows of one batch, and how their logits combine.

Row ``b*R + r`` is branch r of prompt b; branch 0 is the factual one. ``generate()`` sees one row per prompt: inputs are
expanded before the model's forward pass and the logits folded after it, so every decoding mode acts on mixed logits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmfix.errors import MethodError, MmfixError
from mmfix.pictures import Blank as Blank
from mmfix.pictures import DiffusionNoise as DiffusionNoise
from mmfix.relevance import KeepRelevant
from mmfix.selection import Blind, Outliers, Selection
from mmfix_kernels import Edit, MapReplacement

VisionVariant = Literal["paper", "release"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionEdit:
    """A counterfactual look at the same picture.

    Args:
        maps: the map put in place of the vision tower's.
        variant: "paper" replaces the maps of `layers`; "release" leaves the tower alone and multiplies the features it
            hands to the projector by weights made from one map, as CausalMM's released code does.
        layers: tower layers, negative from the end.
        part: "tower", or "resampler": the Q-Former or perceiver between tower and language model, whose layers are its
            attention calls in order (of a Q-Former: self, cross, self, …).
    """

    maps: MapReplacement
    variant: VisionVariant = "paper"
    layers: tuple[int, ...] = (-2,)
    part: Literal["tower", "resampler"] = "tower"


@dataclass(frozen=True, kw_only=True)
class PromptEdit:
    """Another prompt around the same picture.

    Args:
        tokens: ids that are put into the prompt.
        at: "before_image" and "after_image" insert them there (at the first and last image); "question" puts them in
            place of everything after the last image.
        around: ids of tokens that open and close a picture; what is inserted goes outside of them.
    """

    tokens: tuple[int, ...]
    at: Literal["before_image", "after_image", "question"] = "after_image"
    around: tuple[int, ...] = ()

    def __call__(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """One prompt's ids and image mask, [T] without padding, changed."""
        place = image.nonzero()[:, 0]
        first, after = (int(place[0]), int(place[-1]) + 1) if len(place) else (0, 0)
        before, behind = _outside(ids, first, after, self.around)
        start, stop = {
            "before_image": (before, before),
            "after_image": (behind, behind),
            "question": (after, len(ids)),
        }[self.at]
        new = torch.tensor(self.tokens, dtype=ids.dtype, device=ids.device)
        none = torch.zeros_like(new, dtype=torch.bool)
        return torch.cat([ids[:start], new, ids[stop:]]), torch.cat([image[:start], none, image[stop:]])


def _outside(ids: Tensor, first: int, after: int, around: tuple[int, ...]) -> tuple[int, int]:
    """Where a picture at first:after begins and ends together with the tokens that open and close it."""
    while first > 0 and int(ids[first - 1]) in around:
        first -= 1
    while after < len(ids) and int(ids[after]) in around:
        after += 1
    return first, after


@dataclass(frozen=True, kw_only=True)
class RepeatQuestion:
    """The question once more (or several times) in front of the picture.

    The question is the text after the last image, up to the answer's marker where one follows.

    Args:
        times: copies in front of the first image; 0 leaves the prompt as it is.
        marker: token ids that begin an answer; empty takes everything after the last image.
        around: ids of tokens that open and close a picture: the copies go in front of them, and hold none of them.
        special: ids of which the first after the question ends the turn; it and what follows are not copied.
    """

    times: int = 1
    marker: tuple[int, ...] = ()
    around: tuple[int, ...] = ()
    special: tuple[int, ...] = ()

    def __call__(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """One prompt's ids and image mask, [T] without padding, changed; without an image as they are."""
        place = image.nonzero()[:, 0]
        if not len(place):
            return ids, image
        first, after = _outside(ids, int(place[0]), int(place[-1]) + 1, self.around)
        text, width = ids[after:].tolist(), len(self.marker)
        starts = [n for n in range(len(text)) if width and tuple(text[n : n + width]) == self.marker]
        if width and len(starts) != 1:
            raise MmfixError(
                f"{len(starts)} answers begin (token ids {list(self.marker)}) after the image of a prompt, so which "
                "question is to be read again is not known; give prompts of one question, with the answer's header"
            )
        stop = starts[0] if starts else len(text)
        stop = next((n for n in range(stop) if text[n] in self.special), stop)
        question = ids[after : after + stop].repeat(self.times)
        if self.times and not len(question):
            raise MmfixError(
                "there is no question after the image of a prompt, so nothing can be read again; give prompts whose "
                "question follows the image, whole and not in pieces (no prefill_chunk_size)"
            )
        none = torch.zeros_like(question, dtype=torch.bool)
        return torch.cat([ids[:first], question, ids[first:]]), torch.cat([image[:first], none, image[first:]])


# One prompt's ids and image mask, [T] without padding, made into others.
Rewrite = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PixelEdit = DiffusionNoise | Blank | KeepRelevant


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One counterfactual row per prompt.

    Args:
        image: False removes the image tokens from the prompt (positions close up).
        vision: a changed look of the vision tower at the picture, or None.
        pixels: a changed picture, or None.
        prompt: a changed prompt, or None.
        edits: attention edits of this branch alone.
        layers: language layers in which they act; None means all.
        select: which image tokens this branch keeps; None means all.
    """

    image: bool = True
    vision: VisionEdit | None = None
    pixels: PixelEdit | None = None
    prompt: PromptEdit | None = None
    edits: tuple[Edit, ...] = ()
    layers: tuple[int, ...] | None = None
    select: Selection | None = None

    @property
    def looks(self) -> bool:
        """Whether the picture is encoded anew for this branch."""
        return self.vision is not None or self.pixels is not None or isinstance(self.select, Outliers)

    @property
    def sees_otherwise(self) -> bool:
        """Whether the features of this branch's image tokens are not the factual ones."""
        return self.looks or isinstance(self.select, Blind)

    @property
    def rewrites(self) -> bool:
        """Whether the tokens of this branch's prompt are not the factual ones."""
        return not self.image or self.prompt is not None or isinstance(self.select, Outliers)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A contrast that grows with the answer: at generated token t its strength is ``exp(rate (t + start)) - 1``.

    That is ``(1 - g) / g`` with ``g = exp(-rate (t + start))``, M3ID's weight (arXiv:2403.14003).

    Args:
        rate: growth per token, at least 0; 0 never contrasts.
        start: t of the first generated token; tokens of the prompt have it too.
        limit: the largest strength.
    """

    rate: float
    start: int = 0
    limit: float = 1e6

    def __call__(self, steps: Tensor) -> Tensor:
        """Float32[k] of Int64[k]: 0 for the first generated token (and before), 1 for the second, and so on."""
        return torch.expm1(self.rate * (steps.float() + self.start)).clamp(max=self.limit)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the logits of the branches combine, and which tokens stay plausible.

    ``z = sum_r weights[r] * l_r``, then ``z_v = -inf`` unless ``l_v >= log(beta) + max l`` on the factual logits l (the
    adaptive plausibility cut, in float32, before temperature and warpers). With a growth f, what the weights add to l
    is multiplied by f(t), t counting generated tokens: ``z = l + f(t) (sum_r weights[r] * l_r - l)``.

    Args:
        weights: one per branch (or readout), the factual one first; they sum to 1, so that equal branches change
            nothing.
        beta: of the plausibility cut, in (0, 1]; None for no cut.
        log_probs: combine log-probabilities instead of logits.
        growth: how strong the contrast is at each generated token; None means 1 at all of them.
        scale: factor on z, for a method whose weights do not sum to 1: greedy decoding does not see it.
    """

    weights: tuple[float, ...]
    beta: float | None = None
    log_probs: bool = False
    growth: Growth | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise MethodError(f"mix scale {self.scale}: give a number above 0")
        if abs(sum(self.weights) - 1.0) > 1e-6:
            raise MethodError(f"mix weights {self.weights} sum to {sum(self.weights):g}; they must sum to 1")
        if self.beta is not None and not 0.0 < self.beta <= 1.0:
            raise MethodError(f"plausibility cut beta={self.beta}: give a number in (0, 1], or None")

    def __call__(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """[B, R, k, V] → [B, k, V] in the same dtype.

        Args:
            logits: of every branch, at k positions.
            steps: Int64[k], number of the generated token that each position predicts, 0 for the first and in the
                prompt; needed where the contrast grows.
        """
        mixed = self.combined(logits, steps)
        if self.scale != 1.0:
            mixed = mixed * self.scale
        if self.cuts:
            mixed = mixed.masked_fill(self.implausible(logits), float("-inf"))
        # What half precision cannot hold, of a strong contrast: the largest is then put at 0, which changes no choice.
        peak = mixed.amax(-1, keepdim=True)
        mixed = torch.where(peak > torch.finfo(logits.dtype).max / 4, mixed - peak, mixed)
        return mixed.to(logits.dtype)

    @property
    def cuts(self) -> bool:
        """Whether some tokens are removed."""
        return self.beta is not None

    def implausible(self, logits: Tensor) -> Tensor:
        """Bool[B, k, V]: tokens that the cut removes."""
        assert self.beta is not None
        factual = logits[:, 0].float()
        if self.log_probs:
            factual = factual.log_softmax(-1)
        return factual < factual.amax(-1, keepdim=True) + math.log(self.beta)

    def combined(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Float32[B, k, V]: the weighted sum alone."""
        branches = logits.float()
        if self.log_probs:
            branches = branches.log_softmax(-1)
        factual = branches[:, 0]
        mixed = factual * self.weights[0]
        for r, weight in enumerate(self.weights[1:], start=1):
            # What a branch excludes is no reason for what the factual row allows: it counts as the factual row does.
            mixed = mixed + weight * torch.where(branches[:, r].isneginf(), factual, branches[:, r])
        if self.growth is not None:
            if steps is None:
                raise MethodError("a contrast that grows needs the number of each generated token; give steps")
            strength = self.growth(steps)[:, None]  # 0 leaves the factual logits, also where they are infinite
            mixed = torch.where(strength == 0, factual, factual + strength * (mixed - factual))
        return mixed.masked_fill(factual.isneginf(), float("-inf"))  # never a difference of two infinities

    def acts(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Bool[B, k]: positions that the branches change by more than rounding; without branches, that the cut does."""
        if len(self.weights) == 1:
            return (self.implausible(logits) if self.cuts else logits[:, 0].isnan()).any(-1)
        factual = logits[:, 0].float()
        if self.log_probs:
            factual = factual.log_softmax(-1)
        finite = factual.isfinite()
        scale = torch.where(finite, factual.abs(), 0.0).amax(-1, keepdim=True)
        change = torch.where(finite, (self.combined(logits, steps) - factual).abs(), 0.0)
        return (change > 1e-4 * scale).any(-1)


def contrast(gamma: float, branches: int = 1, beta: float | None = None) -> Mix:
    """``(1 + n*gamma) l - gamma * sum l_r`` over n branches: CausalMM, VCD and most of their kin."""
    return Mix(weights=(1.0 + branches * gamma, *[-gamma] * branches), beta=beta)


def guidance(gamma: float, beta: float | None = None) -> Mix:
    """``gamma (c - u) + u`` on log-probabilities, c factual and u the one branch: classifier-free guidance."""
    return Mix(weights=(gamma, 1.0 - gamma), beta=beta, log_probs=True)


class Rows:
    """The rows of a branched batch: how many, and which belong to which branch."""

    def __init__(self, branches: tuple[Branch, ...]) -> None:
        self.branches = branches
        self.count = 1 + len(branches)

    def of(self, branch: int, batch: int, device: torch.device) -> Tensor:
        """Bool[B*R]: the rows of one branch."""
        return torch.arange(batch * self.count, device=device) % self.count == branch

    def without_image(self, batch: int, device: torch.device) -> Tensor:
        """Bool[B*R]: the rows whose prompt has no image tokens."""
        gone = torch.tensor([False, *(not b.image for b in self.branches)], device=device)
        return gone.repeat(batch)

    def expand(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.repeat_interleave(self.count, dim=dim)

    def fold(
        self,
        output: Any,
        mix: Mix,
        has_image: Tensor,
        length: int,
        beyond: int = 0,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Any, Tensor]:
        """A model output whose logits are mixed, and counts of positions changed and seen.

        Args:
            has_image: Bool[B]; a prompt without an image keeps its factual logits.
            length: positions that were asked for; rows with a longer prompt have more.
            beyond: generated tokens up to the output's last position; negative inside the prompt.
            beside: gives further logits [B, n, k, V] from the output's [B, k, V].
        """
        logits = output.logits if hasattr(output, "logits") else output[0]
        further = None if beside is None else beside(logits)[:, :, -length:]
        logits = logits[:, -length:]
        branches = logits.reshape(-1, self.count, *logits.shape[1:])
        branches = branches if further is None else torch.cat([branches, further], dim=1)
        factual = branches[:, 0]
        steps = None
        if mix.growth is not None:
            steps = torch.arange(beyond - factual.shape[1] + 1, beyond + 1, device=factual.device).clamp(min=0)
        mixed = torch.where(has_image[:, None, None], mix(branches, steps), factual)
        changed = mix.acts(branches, steps) & has_image[:, None]
        counts = torch.stack([changed.sum(), changed.new_tensor(changed.numel(), dtype=torch.int64)])
        if hasattr(output, "logits"):
            output.logits = mixed
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(hidden[:: self.count] for hidden in output.hidden_states)
            return output, counts
        return (mixed, *output[1:]), counts


def trimmed(output: Any, length: int) -> Any:
    """A model output with the logits of its last `length` positions."""
    if hasattr(output, "logits"):
        output.logits = output.logits[:, -length:]
        return output
    return (output[0][:, -length:], *output[1:])


def drop_image(ids: Tensor, valid: Tensor, image: Tensor, rows: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Prompts of `rows` without the tokens of `image`, the others as they are.

    What is left is pushed to the right, up to where the prompt ended, so that the text after the image stays in place.

    Args:
        ids: [N, T], or embeddings [N, T, hidden].
        valid, image: [N, T]; rows: Bool[N]; pad: what is put in the freed places.

    Returns:
        `ids` and `valid`, in the same shapes.
    """
    keep = valid & ~image
    places = torch.arange(valid.shape[1], device=valid.device)
    after = places > torch.where(valid, places, -1).amax(-1, keepdim=True)  # padding on the right
    order = torch.argsort(keep.int() + 2 * after.int(), dim=-1, stable=True)
    short_valid = keep.gather(1, order)
    wide = order if ids.ndim == 2 else order[..., None].expand_as(ids)
    empty, chosen = ~short_valid, rows[:, None]
    if ids.ndim == 3:
        empty, chosen = empty[..., None], chosen[..., None]
    short = ids.gather(1, wide).masked_fill(empty, pad)
    return torch.where(chosen, short, ids), torch.where(rows[:, None], short_valid, valid)


class CacheRows:
    """Makes a cache's batch operations, which count prompts, act on rows. Undone by :meth:`restore`."""

    _INDEXED = ("reorder_cache", "batch_select_indices")
    _ALL = (*_INDEXED, "batch_repeat_interleave", "crop")

    def __init__(self, cache: Any, count: int, longer: int = 0) -> None:
        """`longer`: tokens by which the rows' prompts are longer than the one that ``generate()`` knows."""
        self._cache = weakref.ref(cache)  # caches of finished generations are not kept alive
        self.count, self.longer = count, longer
        for name in self._INDEXED:
            original = getattr(type(cache), name, None)
            if original is not None:
                setattr(cache, name, self._on_rows(original))
        cache.batch_repeat_interleave = self._repeat
        if longer:
            cache.crop = self._crop

    @property
    def cache(self) -> Any:
        """The cache; None once nobody else holds it."""
        return self._cache()

    def _on_rows(self, original: Any) -> Any:
        def act(index: Tensor) -> Any:
            rows = index[:, None] * self.count + torch.arange(self.count, device=index.device)
            return original(self.cache, rows.flatten())

        return act

    def _repeat(self, repeats: int) -> None:
        keys = next(layer.keys for layer in self.cache.layers if layer.keys is not None)
        prompts = torch.arange(keys.shape[0] // self.count, device=keys.device)
        self.cache.batch_select_indices(prompts.repeat_interleave(repeats))

    def _crop(self, length: int) -> None:
        type(self.cache).crop(self.cache, length + self.longer if length > 0 else length)

    def restore(self) -> None:
        cache = self.cache
        if cache is None:
            return
        for name in self._ALL:
            cache.__dict__.pop(name, None)
        for layer in getattr(cache, "layers", ()):
            if (
                getattr(layer, "keys", None) is None
                or not layer.keys.numel()
                or getattr(layer, "is_compileable", False)
            ):
                continue
            layer.keys, layer.values = layer.keys[:: self.count], layer.values[:: self.count]
