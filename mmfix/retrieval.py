"""Retrieval heads: which heads look at what the model is about to say, while it says it.

*Retrieval Head Mechanistically Explains Long-Context Factuality* (arXiv:2404.15574). While a model decodes greedily, a
head retrieves at a step when the key it attends to most lies inside the needle and is the token that the step puts
out. Two needles are served: a text that the model repeats, as in the paper, and (ours) the patches of the object that
the token names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfix.engine import mitigate
from mmfix.families import describe
from mmfix.recording import record_attention


class Decoded(NamedTuple):
    """A greedy answer, and where each head looked when it put out each token.

    Args:
        tokens: Int64[B, steps].
        peaks: Int64[steps, layers, B, H], the key attended to most; keys are those of the padded prompt and then the
            generated tokens.
        mass: Float32[steps, layers, B, H], attention on the needle.
    """

    tokens: Tensor
    peaks: Tensor
    mass: Tensor


def decode(model: Any, inputs: dict[str, Tensor], needle: Tensor, steps: int, stop: Sequence[int] = ()) -> Decoded:
    """Decode a batch greedily. One row of attention per layer and step is looked at; no map is ever made.

    Args:
        needle: Bool[B, T], the prompt's needle tokens.
        steps: tokens that are decoded at most.
        stop: token ids that end an answer.
    """
    width = inputs["input_ids"].shape[1]
    peaks: list[Tensor] = []
    mass: list[Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        weights = recorder.weights()
        assert weights is not None
        peaks.append(weights.argmax(-1))
        mass.append(weights[..., :width].masked_fill(~needle[None, :, None], 0.0).sum(-1))

    with torch.no_grad(), mitigate(model, None, telemetry=True), record_attention(model) as recorder:
        handle = describe(model).model.register_forward_hook(see)
        try:
            extra = {"eos_token_id": list(stop)} if stop else {}
            rows = model.generate(**inputs, max_new_tokens=steps, do_sample=False, use_cache=True, **extra)
        finally:
            handle.remove()
    made = rows[:, width:]
    return Decoded(made, torch.stack(peaks)[: made.shape[1]], torch.stack(mass)[: made.shape[1]])


def copied(found: Decoded, ids: Tensor, needle: Tensor, ends: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """The paper's score of a needle of text.

    Args:
        ids: Int64[B, T], the prompt.
        needle: Bool[B, T], its needle tokens.
        ends: tokens that end an answer; what follows the first of them is not looked at.

    Returns:
        Float32[B, layers, H]: per head, (steps at which it looked most at a needle token that is the token put
        out) / |needle|; and Float32[B]: ROUGE-1 recall, the share of the needle's tokens that the answer holds.
    """
    steps, layers, batch, heads = found.peaks.shape
    scores = torch.zeros(batch, layers, heads)
    recall = torch.zeros(batch)
    for row in range(batch):
        places = needle[row].cpu()
        size = int(places.sum())
        said = _until(found.tokens[row].tolist(), ends)
        wanted = Counter(ids[row].cpu()[places].tolist())
        recall[row] = (wanted & Counter(said)).total() / max(1, size)
        for step, token in enumerate(said[:steps]):
            peak = found.peaks[step, :, row].cpu()  # [layers, H]
            inside = peak < places.shape[0]
            at = peak.clamp(max=places.shape[0] - 1)
            hit = inside & places[at] & (ids[row].cpu()[at] == token)
            scores[row] += hit.float() / max(1, size)
    return scores, recall


def placed(found: Decoded, targets: Sequence[Sequence[tuple[int, Tensor]]]) -> tuple[Tensor, int]:
    """The score of a needle in the picture, our extension.

    Args:
        targets: per prompt, (step, Bool[T] of the image tokens of the thing that the step's token names).

    Returns:
        Float32[layers, H]: share of the named things at whose tokens a head looked most of all keys when it named
        them; and how many things were named.
    """
    _, layers, _, heads = found.peaks.shape
    hits, count = torch.zeros(layers, heads), 0
    for row, named in enumerate(targets):
        for step, places in named:
            peak = found.peaks[step, :, row].cpu()
            hits += ((peak < places.shape[0]) & places.cpu()[peak.clamp(max=places.shape[0] - 1)]).float()
            count += 1
    return hits / max(1, count), count


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first one that ends an answer."""
    first = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:first]
