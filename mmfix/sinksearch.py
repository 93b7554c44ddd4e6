"""Finding the hidden dimensions in which a model's attention sinks are massive, from a few prompts.

Of every batch of prompts only some rows of hidden states are kept (:class:`~mmfix.parts.Parts`): those of the sinks,
and a sample of the others. So memory does not grow with a model's layers, and a stopped search goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from mmfix.calibration import SinkCalibration, model_name
from mmfix.errors import MmfixError
from mmfix.families import Family, describe
from mmfix.parts import Part, Parts

SAMPLE = 8192  # rows of other tokens that all prompts together are asked for
_LEAST = 32  # and those that each of many prompts gives


def rows_each(prompts: int) -> int:
    """Rows of other tokens to keep of each prompt, so that all together give about ``SAMPLE``."""
    return max(_LEAST, SAMPLE // max(1, prompts))


def find_sinks(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Tensor]],
    first_layer: int = 2,
    progress: Callable[[int], None] = lambda done: None,
    parts: Parts | None = None,
    rows: int = 512,
) -> SinkCalibration:
    """Find a model's sink dimensions from a few prompts.

    A sink is a prompt token that receives, averaged over heads and over the rows that may see it, at least ten times
    the attention of the median token of its prompt. The dimensions are those (at most two) in which sinks are larger
    than 99 % of the other tokens by the largest factor, with x measured as ``|x_d| / RMS(x)``.

    Args:
        model: a vision-language model in evaluation mode.
        batches: processor outputs (``input_ids``, ``pixel_values``, …), with images.
        first_layer: layers before it are not looked at (their inputs are still embeddings).
        progress: told the prompts done.
        parts: what an earlier search with the same batches left, one part per batch; None keeps nothing.
        rows: tokens other than sinks that are kept of each prompt, over all layers, drawn at random where it has more.

    Raises:
        MmfixError: no prompt was given, or no token stands out.
    """
    family = describe(model)
    if family.num_layers < first_layer + 2:
        raise MmfixError(
            f"{model_name(model)!r} has {family.num_layers} layers and sinks are looked for from layer {first_layer} "
            f"to the last but one; use a model of at least {first_layer + 2} layers"
        )
    parts = Parts() if parts is None else parts
    kept: list[Part] = []
    for number, batch in enumerate(batches):
        look = partial(_looked, family, batch, first_layer, rows, number)
        kept.append(parts.get(f"sinks-{number:05d}", look))
        progress(int(kept[-1]["prompts"]))
    if not kept:
        raise MmfixError("no prompts to calibrate on; give at least one picture")
    if not any(len(part["sinks"]) for part in kept):
        raise MmfixError(
            f"no token of {model_name(model)!r} collects ten times the median attention: the model shows no attention "
            "sinks, and VAR has nothing to move; use another method"
        )
    return _concluded(kept)


def _looked(family: Family, batch: dict[str, Tensor], first_layer: int, rows: int, number: int) -> Part:
    """What is kept of one batch.

    ``sinks`` [N, hidden] and ``others`` [M, hidden] hold |x_d| / RMS(x) of tokens at the input of some layer, the
    second ones for ``share`` of all of them; ``sink_image`` [N] and ``other_image`` [M] say which are image tokens.
    """
    hidden, received, valid, image = attention_received(family, batch)
    generator = torch.Generator().manual_seed(number)
    layers = range(first_layer, family.num_layers - 1)
    sink = torch.stack([_stands_out(received[layer], valid) for layer in layers])  # [layers, B, T]
    other = valid & ~sink
    places = other.flatten().nonzero()[:, 0].cpu()
    wanted = rows * valid.shape[0]
    if len(places) > wanted:
        places = places[torch.randperm(len(places), generator=generator)[:wanted].sort().values]
    taken = torch.zeros(other.numel(), dtype=torch.bool)
    taken[places] = True
    taken = taken.view(other.shape).to(other.device)
    sinks, others = [], []
    for n, layer in enumerate(layers):
        x = hidden[layer].float()
        phi = x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        sinks.append(phi[sink[n]])
        others.append(phi[taken[n]])
    pictured = image.expand(sink.shape)
    return {
        "sinks": torch.cat(sinks), "sink_image": pictured[sink], "others": torch.cat(others),
        "other_image": pictured[taken], "share": torch.tensor(len(places) / max(1, int(other.sum()))),
        "prompts": torch.tensor(valid.shape[0]), "looked": torch.tensor(valid.shape[0] * len(layers)),
    }  # fmt: skip


def _stands_out(received: Tensor, valid: Tensor) -> Tensor:
    """Bool[B, T]: tokens that receive at least ten times what the median token of their prompt does."""
    median = received.masked_fill(~valid, float("nan")).nanmedian(-1, keepdim=True).values
    return (received >= 10 * median) & valid


def _concluded(kept: list[Part]) -> SinkCalibration:
    """Dimensions and threshold from what was kept of every batch."""
    inside, outside = (torch.cat([part[name] for part in kept]) for name in ("sinks", "others"))
    typical = torch.quantile(outside, 0.99, dim=0)
    strength = inside.median(0).values
    order = (strength / typical.clamp(min=1e-6)).argsort(descending=True)
    dims = [int(order[0])]
    if strength[order[1]] / typical[order[1]] >= 0.5 * strength[order[0]] / typical[order[0]]:
        dims.append(int(order[1]))
    sink_phi = float(inside[:, dims].amax(-1).median())
    other_phi = float(torch.quantile(outside[:, dims].amax(-1), 0.99))
    tau = min(20.0, round((sink_phi * max(other_phi, 1e-6)) ** 0.5, 3))
    looked = max(1, sum(int(part["looked"]) for part in kept))
    return SinkCalibration(
        sink_dims=tuple(sorted(dims)),
        tau=tau,
        sink_phi=sink_phi,
        other_phi=other_phi,
        sinks_per_prompt=sum(_above(part, dims, tau) for part in kept) / looked,
        image_sinks_per_prompt=sum(_above(part, dims, tau, image=True) for part in kept) / looked,
        prompts=sum(int(part["prompts"]) for part in kept),
    )


def _above(part: Part, dims: list[int], tau: float, image: bool = False) -> float:
    """Tokens of a batch above tau, those of the image alone if asked; others than sinks by their sample."""
    sinks, others = (part[name][:, dims].amax(-1) >= tau for name in ("sinks", "others"))
    if image:
        sinks, others = sinks & part["sink_image"], others & part["other_image"]
    return float(sinks.sum()) + float(others.sum()) / max(float(part["share"]), 1e-12)


def attention_received(family: Family, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Layer inputs [B, T, hidden] and attention received per key [B, T], for every layer of one prefill."""
    decoder, model = family.decoder, family.whole
    before = decoder.config._attn_implementation_internal
    decoder.set_attn_implementation("eager")  # the only implementation that returns maps
    try:
        with torch.no_grad():
            out = model(**batch, output_attentions=True, output_hidden_states=True, use_cache=False)
    finally:
        decoder.set_attn_implementation(before)
    ids = batch["input_ids"]
    valid = batch.get("attention_mask", torch.ones_like(ids)).bool()
    seen_by = valid.flip(-1).cumsum(-1).flip(-1).clamp(min=1)  # rows that may see a key
    received = [(a.float().mean(1) * valid[:, :, None]).sum(1) / seen_by for a in out.attentions]
    return list(out.hidden_states), received, valid, (ids == family.image_token_id) & valid
