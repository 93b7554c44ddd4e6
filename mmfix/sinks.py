"""Attention sinks: which tokens of a prompt they are, layer by layer, and in which hidden dimensions they stand out.

One definition serves the methods that act on sinks and the diagnostics that show them: a token is a sink at a layer
when its input x to that layer is massive in one of the model's sink dimensions (VAR, arXiv:2503.03321)::

    phi(x) = max_{d in dims} |x_d| / RMS(x) >= tau
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mmfix.families import Family


def phi(hidden: Tensor, dims: Sequence[int], slack: float = 0.0) -> Tensor:
    """Float32[...] from [..., hidden]: how massive a token is in `dims`.

    Args:
        slack: added to the mean square, as released code does with 1e-6.
    """
    x = hidden.float()
    found: Tensor = x[..., list(dims)].abs().amax(-1) / (x.square().mean(-1) + slack).sqrt()
    return found


@dataclass(frozen=True, eq=False)
class LayerSinks:
    """Sinks of one prompt at one layer.

    Args:
        phi: Float32[T]; 0 on padding.
        sink: Bool[T].
        received: Float32[T], mean attention that a token receives from the rows that see it, over heads.
        dims: the two hidden dimensions in which the sinks (or, without any, the token of largest phi) are largest.
        sizes: |x_d| / RMS(x) in these dimensions, median over the sinks.
    """

    phi: Tensor
    sink: Tensor
    received: Tensor
    dims: tuple[int, ...]
    sizes: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Sinks:
    """Sinks of one prompt, at the input of every layer; `image` and `valid` are Bool[T]."""

    layers: tuple[LayerSinks, ...]
    image: Tensor
    valid: Tensor
    dims: tuple[int, ...]
    tau: float

    def counts(self) -> tuple[list[int], list[int]]:
        """Text sinks and image sinks of each layer."""
        text = [int((one.sink & ~self.image).sum()) for one in self.layers]
        return text, [int((one.sink & self.image).sum()) for one in self.layers]


def observe(family: Family, inputs: dict[str, Tensor], dims: Sequence[int], tau: float) -> list[Sinks]:
    """Sinks of each prompt of a batch, in the plain model.

    Args:
        inputs: processor outputs, with pictures.
        dims: the model's sink dimensions.
        tau: threshold on phi.
    """
    from mmfix.sinksearch import attention_received

    hidden, received, valid, image = attention_received(family, inputs)
    found = []
    for row in range(valid.shape[0]):
        layers = []
        for layer in range(family.num_layers):
            x = hidden[layer][row].float().cpu()
            real = valid[row].cpu()
            size = phi(x, dims).masked_fill(~real, 0.0)
            sink = (size >= tau) & real
            who = sink if bool(sink.any()) else size == size.max()
            relative = x[who].abs() / x[who].square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
            largest, at = relative.median(0).values.topk(min(2, x.shape[-1]))
            layers.append(
                LayerSinks(size, sink, received[layer][row].float().cpu(), tuple(at.tolist()), tuple(largest.tolist()))
            )
        found.append(Sinks(tuple(layers), image[row].cpu(), valid[row].cpu(), tuple(dims), tau))
    return found


def described(found: Sinks, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """The sinks as JSON: per layer its largest dimensions and each sink with its place, kind, token, phi and share."""
    numbers = (found.image.long().cumsum(0) - 1).tolist()  # of image tokens
    rows = []
    for layer, one in enumerate(found.layers):
        sinks = [
            {
                "position": int(n), "kind": "image" if bool(found.image[n]) else "text",
                "image_token": numbers[n] if bool(found.image[n]) else None, "token": tokens[n],
                "phi": round(float(one.phi[n]), 3), "received": round(float(one.received[n]), 5),
            }
            for n in one.sink.nonzero()[:, 0].tolist()
        ]  # fmt: skip
        dims = [{"dim": d, "size": round(s, 3)} for d, s in zip(one.dims, one.sizes, strict=True)]
        rows.append({"layer": layer, "dims": dims, "sinks": sinks})
    return rows
