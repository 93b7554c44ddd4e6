"""Scores of heads that one prompt tells: attention on the picture, dependence on it, importance for the answer.

All are taken at the last position of the prompt, which chooses the first word of the answer, in the plain model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mmfix.engine import mitigate
from mmfix.errors import MmfixError
from mmfix.families import describe
from mmfix.method import Method, MethodInfo, Site
from mmfix.recording import record_attention
from mmfix_kernels import Edit, HeadMean, HeadScale


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe(Method):
    """Measures vision-aware head divergence in every layer, and changes nothing.

    ``VHD_i = || A_i(image, text) - A_i(text) ||_2`` (arXiv:2412.13949), A_i the head's output at the last position.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        "probe", "Head probe", "arXiv:2412.13949", "head scale", 1.0, False, {}, Method
    )
    found: dict[int, Tensor] = field(default_factory=dict)

    def wants_heads(self, layer: int, num_layers: int) -> bool:
        return True

    def head_scale(self, site: Site, heads: Tensor, text_only: Tensor) -> HeadScale:
        self.found[site.layer] = (heads.float() - text_only.float()).norm(dim=-1)
        return HeadScale(scale=torch.ones(heads.shape[:2], device=heads.device))


class Looks(NamedTuple):
    """What the heads do at the last position of a batch of prompts.

    Args:
        weights: Float32[layers, B, H, T], attention over the prompt.
        image: Bool[B, T], image tokens.
        divergence: Float32[layers, B, H], vision-aware head divergence.
    """

    weights: Tensor
    image: Tensor
    divergence: Tensor

    @property
    def mass(self) -> Tensor:
        """Float32[layers, B, H]: attention on the picture."""
        return self.weights.masked_fill(~self.image[None, :, None], 0.0).sum(-1)

    def t_vhd(self, k: int) -> Tensor:
        """Float32[B]: T-VHD, the sum over layers of the k largest divergences of a layer (arXiv:2412.13949)."""
        return self.divergence.topk(min(k, self.divergence.shape[-1]), dim=-1).values.sum((0, 2))


def look(model: Any, inputs: dict[str, Tensor]) -> Looks:
    """One forward pass of a batch of prompts with pictures, and a short one without them.

    Raises:
        MmfixError: no picture in the batch.
        UnsupportedModel: the model's pictures are no part of its prompts.
    """
    probe = Probe()
    with torch.no_grad(), mitigate(model, probe, telemetry=True) as fix, record_attention(model) as recorder:
        model(**inputs)
        weights, image = recorder.weights(), fix.image_tokens
    if weights is None or image is None or len(probe.found) != len(weights):
        raise MmfixError("the prompts hold no picture, or a layer's attention was not seen; give prompts with pictures")
    return Looks(weights, image, torch.stack([probe.found[n] for n in range(len(weights))]))


Progress = Callable[[int], None]


def mean_looks(model: Any, batches: Iterable[dict[str, Tensor]], progress: Progress | None = None) -> dict[str, Any]:
    """Means over prompts: ``"vhd"`` and ``"image-mass"`` Float32[layers, heads], ``"prompts"``.

    Raises:
        MmfixError: no prompts.
    """
    vhd = mass = None
    count = 0
    for inputs in batches:
        found = look(model, inputs)
        vhd = found.divergence.sum(1) if vhd is None else vhd + found.divergence.sum(1)
        mass = found.mass.sum(1) if mass is None else mass + found.mass.sum(1)
        count += found.image.shape[0]
        if progress is not None:
            progress(found.image.shape[0])
    if vhd is None or mass is None:
        raise MmfixError("no prompts to measure heads on; give at least one picture")
    return {"vhd": vhd.cpu() / count, "image-mass": mass.cpu() / count, "prompts": count}


@dataclass(kw_only=True, eq=False, frozen=True)
class _Averaged(Method):
    """Puts the mean of the other heads in place of one head, in prompts with an image or without."""

    info: ClassVar[MethodInfo] = MethodInfo("averaged", "One head averaged", "", "head scale", 1.0, False, {}, Method)
    place: list[int] = field(default_factory=list)  # layer and head; empty for none

    def edits(self, site: Site) -> Sequence[Edit]:
        if not self.place or self.place[0] != site.layer:
            return ()
        heads = torch.zeros(site.num_heads, dtype=torch.bool, device=site.spans.image.device)
        heads[self.place[1]] = True
        return (HeadMean(heads=heads),)


def answer_probability(model: Any, inputs: dict[str, Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
    """Float32[B]: probability that the first token of the answer is one of `answers`, ids for each prompt."""
    sure = first_token(model, inputs)
    return torch.stack([sure[row, list(ids)].sum() for row, ids in enumerate(answers)])


def first_token(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Float32[B, V]: probabilities of the first token of the answer, in whatever mitigation is running."""
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        found: Tensor = model(**inputs, **fewer).logits[:, -1].float().softmax(-1)
    return found


def importance(
    model: Any,
    batches: Sequence[tuple[dict[str, Tensor], Sequence[Sequence[int]]]],
    progress: Progress | None = None,
) -> tuple[Tensor, float]:
    """V-SEAM's score: how much the right answer loses when a head says what the others say on average.

    ``score[l, h] = mean over questions of p(right) - p(right | output of head h put to the mean of the other heads)``,
    p of the first token of the answer, the replacement at every position. It costs layers × heads + 1 prefills.

    Args:
        model: a vision-language model in evaluation mode.
        batches: inputs, and for every question the token ids with which the right answer may begin.
        progress: told the number of heads done.

    Returns:
        Float32[layers, heads] and the plain mean p(right).

    Raises:
        MmfixError: no questions, or heads that cannot be averaged because there is one.
    """
    family = describe(model)
    if not batches:
        raise MmfixError("no questions to score heads on; give at least one")
    if family.num_heads < 2:
        raise MmfixError("the model has one head per layer, and there are no others to average; use another score")
    scores = torch.zeros(family.num_layers, family.num_heads)
    probe = _Averaged()

    def right() -> Tensor:
        return torch.cat([answer_probability(model, inputs, answers) for inputs, answers in batches]).cpu()

    with mitigate(model, probe):
        plain = right()
        for layer in range(family.num_layers):
            for head in range(family.num_heads):
                probe.place[:] = [layer, head]
                scores[layer, head] = (plain - right()).mean()
                if progress is not None:
                    progress(1)
    return scores, float(plain.mean())
