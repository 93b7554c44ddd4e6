"""VAR: visual attention redistribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmfix.calibration import sink_dimensions
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix.sinks import phi
from mmfix_kernels import Edit, Group, MassGate, MassMove, Rows


@register("var", title="Visual Attention Redistribution", paper="arXiv:2503.03321", kind="mass move")
@dataclass(frozen=True, kw_only=True)
class VAR(Method):
    """Move attention from sink tokens to the image tokens that are not sinks, in image-centric heads.

    *See What You Are Told: Visual Attention Sink in Large Multimodal Models* (ICLR 2025, arXiv:2503.03321).
    A prompt token j is a sink at layer l when its input x_j to that layer is large in a sink dimension::

        phi(x) = max_{d in sink_dims} |x_d| / RMS(x) >= tau

    For a query row i after the image, a head is image-centric when it gives at least `min_image_mass` to the image
    and at most `max_sink_share` of that to image sinks. There, with S all sinks and I' the image tokens that are not::

        A_ij <- (1 - move) * A_ij                                    j in S
        A_ij <- A_ij * (1 + move * sum_S A_i / sum_I' A_i)           j in I'

    so every row still sums to one. One forward pass per token; sinks are found anew for every prompt.

    Args:
        sink_dims: hidden dimensions with massive activations; None takes the known ones of the model, or those that
            ``mmfix calibrate sinks`` found.
        tau: threshold on phi, from 0 to sqrt(hidden size) (phi cannot be larger).
        min_image_mass: least attention on the image, 0 to 1.
        max_sink_share: largest share of the image mass on image sinks, 0 to 1 (the paper's rho is 1 minus this;
            it uses 0.5 for hallucination benchmarks).
        move: share of the sinks' mass that is moved, 0 to 1 (released code: p = 1 - move).
        first_layer: layers before this one are never edited.
        skip_last_layer: leave the last layer alone, as the paper does; the released code edits it.
        variant: "paper" tests phi >= tau and the plain sink share; "release" reproduces the released code's
            phi > tau (RMS with 1e-6 inside the root) and its 1e-6 per image token in the share's denominator.

    Raises:
        MethodError: a value out of range, or a model whose sink dimensions are unknown.
    """

    sink_dims: tuple[int, ...] | None = param(None, "hidden dimensions with massive activations; empty = known ones")
    tau: float = param(20.0, "threshold on phi = |x_d| / RMS(x)", 0.0, 100.0)
    min_image_mass: float = param(0.2, "least attention mass on the image", 0.0, 1.0)
    max_sink_share: float = param(0.5, "largest share of the image mass on image sinks", 0.0, 1.0)
    move: float = param(0.6, "share of the sinks' mass that is moved", 0.0, 1.0)
    first_layer: int = param(2, "first edited layer", 0, 1000)
    skip_last_layer: bool = param(True, "leave the last layer alone")
    variant: Literal["paper", "release"] = param("paper", "paper or release")

    def __post_init__(self) -> None:
        self.check("tau", 0.0, float("inf"))
        for name in ("min_image_mass", "max_sink_share", "move"):
            self.check(name, 0.0, 1.0)
        self.check("first_layer", 0, 10_000)
        if self.variant not in ("paper", "release"):
            raise MethodError(f"var.variant={self.variant!r}: choose 'paper' or 'release'")
        if self.sink_dims is not None:
            object.__setattr__(self, "sink_dims", tuple(int(d) for d in self.sink_dims))

    def prepare(self, family: Family) -> VAR:
        dims = self.sink_dims if self.sink_dims is not None else sink_dimensions(family)
        if not dims or min(dims) < 0 or max(dims) >= family.hidden_size:
            raise MethodError(f"var.sink_dims={dims!r}: give dimensions from 0 to {family.hidden_size - 1}")
        return dataclasses.replace(self, sink_dims=dims)

    def _edits_layer(self, layer: int, num_layers: int) -> bool:
        return self.move > 0 and self.first_layer <= layer < num_layers - self.skip_last_layer

    def wants_sinks(self, layer: int, num_layers: int) -> bool:
        return self._edits_layer(layer, num_layers)

    def sinks(self, site: Site, hidden: Tensor) -> Tensor:
        release = self.variant == "release"
        size = phi(hidden, self.sink_dims or (), slack=1e-6 if release else 0.0)
        return size > self.tau if release else size >= self.tau

    def edits(self, site: Site) -> Sequence[Edit]:
        if not self._edits_layer(site.layer, site.num_layers):
            return []
        gate = MassGate(
            group=Group.IMAGE,
            min_mass=self.min_image_mass,
            part=Group.IMAGE_SINK,
            max_share=self.max_sink_share,
            slack=1e-6 if self.variant == "release" else 0.0,
        )
        return [
            MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=self.move, rows=Rows.AFTER_IMAGE, gate=gate)
        ]
