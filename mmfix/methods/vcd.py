"""VCD: visual contrastive decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix, contrast
from mmfix.pictures import DiffusionNoise
from mmfix.registry import param, register


@register("vcd", title="Visual Contrastive Decoding", paper="arXiv:2311.16922", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class VCD(Method):
    """Subtract what the model would say about a noisy picture.

    *Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding* (CVPR 2024,
    arXiv:2311.16922). With logits l of the picture v and l' of the noisy picture v'::

        v'  = sqrt(abar_T) v + sqrt(1 - abar_T) e        e standard normal, v the normalised pixels
        z   = (1 + alpha) l - alpha l'
        cut   z_i = -inf unless l_i >= log(beta) + max l

    abar is the schedule of :class:`mmfix.pictures.DiffusionNoise`; of the signal's power 0.745 is left at step 500 and
    0.081 at step 999. The noisy picture is a row of the same batch with its own cache, so every decoding mode acts on
    z. Sampling profits from the cut alone, without any contrast: compare with ``plausibility``.

    The released code gives alpha as 1 on its command line and 0.5 where that is missing, beta as 0.1 or (for POPE) 0.2;
    here each has one default. It serves sampling only, and draws e from the global generator, so that its output
    depends on the global seed even at temperature 0; here e depends on `seed` and the picture's shape alone.

    Args:
        alpha: strength of the contrast, from -1; 0 runs no second branch and leaves the cut, less than 0 moves towards
            the noisy picture.
        beta: plausibility cut, in (0, 1].
        step: diffusion step T, 0 to 999.
        seed: of the noise.

    Raises:
        MethodError: a value out of range.
    """

    alpha: float = param(1.0, "strength of the contrast", -1.0, 5.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)
    step: int = param(500, "diffusion step of the noise", 0, 999)
    seed: int = param(0, "seed of the noise", 0, 2**31 - 1)

    def __post_init__(self) -> None:
        self.check("alpha", -1.0, 100.0)
        self.check("beta", 1e-9, 1.0)
        self.check("step", 0, 999)
        self.check("seed", 0, 2**31 - 1)

    def branches(self, family: Family) -> Sequence[Branch]:
        return [Branch(pixels=DiffusionNoise(step=self.step, seed=self.seed))] if self.alpha else []

    def mix(self) -> Mix:
        return contrast(self.alpha, branches=int(self.alpha != 0), beta=self.beta)
