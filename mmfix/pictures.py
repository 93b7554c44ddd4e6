"""Changed pictures for contrast branches, as models take them: normalised pixels, or patches of several in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix_kernels.maps import counter_uniform


@dataclass(frozen=True, kw_only=True)
class DiffusionNoise:
    """The picture after t steps of a diffusion process: ``sqrt(abar_t) x + sqrt(1 - abar_t) e``, e standard normal.

    ``beta_i = sigmoid(linspace(-6, 6, 1000)_i) * (5e-3 - 1e-5) + 1e-5`` and ``abar = cumprod(1 - beta)``, applied to
    the normalised pixels (VCD, arXiv:2311.16922). The noise of a pixel depends on `seed` and its place in the picture
    (or tile) alone, so that other pictures of a batch, and padding to their size, do not matter.

    Args:
        step: t, 0 to 999.
        seed: of the noise.
    """

    step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.step <= 999:
            raise MethodError(f"noise step {self.step}: give a step from 0 to 999")

    @property
    def signal(self) -> float:
        """``abar_t``, the share of the signal's power that is left."""
        beta = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
        return float((1 - beta).cumprod(0)[self.step])

    def __call__(self, pixels: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Pixels [..., channels, height, width] or packed patches [N, D], in the same shape and dtype.

        Args:
            lengths: of packed patches, how many every picture has; None for those of one picture.
        """
        noise = self.noise(pixels.shape, lengths).to(pixels.device)
        noised = (self.signal**0.5 * pixels.float() + (1 - self.signal) ** 0.5 * noise).to(pixels.dtype)
        return noised if pixels.ndim < 3 else torch.where(_places(pixels), noised, pixels)

    def noise(self, shape: Sequence[int], lengths: Sequence[int] | None = None) -> Tensor:
        """Float32, standard normal, broadcastable to `shape` (Box and Muller's transform of two uniform numbers)."""
        if len(shape) < 3:
            patches = torch.cat([torch.arange(n) for n in (lengths or (shape[0],))])
            places = torch.zeros(1, 1, dtype=torch.int64), patches[:, None], torch.arange(shape[1])[None]
        else:
            channel, row, column = (torch.arange(n) for n in shape[-3:])
            places = channel[:, None, None], row[:, None], column
        head, row, column = (place + 0 * sum(places) for place in places)
        radius, angle = (counter_uniform(2 * self.seed + n, head, row, column) for n in (0, 1))
        return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


@dataclass(frozen=True, kw_only=True)
class Blank:
    """A picture without content: every pixel is `value` after normalisation (0 is the mean colour)."""

    value: float = 0.0

    def __call__(self, pixels: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        blank = torch.full_like(pixels, self.value)
        return blank if pixels.ndim < 3 else torch.where(_places(pixels), blank, pixels)


def _places(pixels: Tensor) -> Tensor:
    """Bool[..., 1, 1, 1]: pictures and tiles that are there.

    A batch [N, channels, height, width] holds pictures only, whatever their colour. With an axis of tiles or pictures
    per prompt, those that fill it up are zero all over; models tell them by that, and so is it done here, so that a
    tile of nothing but the mean colour (0 after normalisation) stays as it is.
    """
    if pixels.ndim <= 4:
        return torch.ones((*pixels.shape[:-3], 1, 1, 1), dtype=torch.bool, device=pixels.device)
    return pixels.ne(0).flatten(-3).any(-1)[..., None, None, None]
