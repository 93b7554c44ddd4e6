"""OPERA: beam search with a penalty on over-trust, and a way back."""

from __future__ import annotations

from dataclasses import dataclass

from mmfix.method import Method
from mmfix.registry import param, register
from mmfix.search import OverTrust


@register("opera", title="OPERA", paper="arXiv:2311.17911", kind="search", passes=6)
@dataclass(frozen=True, kw_only=True)
class Opera(Method):
    """Over-trust penalty and retrospection-allocation: candidates that lean on one earlier token lose.

    Each beam's C likeliest next tokens are tried, each with a pass. With w_ij the attention of generated token i to
    generated token j in the last layer (the largest over heads; a row divided by its sum over all keys) and n the
    number of generated tokens with the candidate, a candidate's logit is lowered by ``weight * phi``::

        s_j = 1e-7 prod_{i >= j} sigma w_ij        phi = max_j s_j         (n > grace)
                                                   phi = -(share of its row on the image)   (n <= grace)

    and log-probabilities are taken among the candidates. When the most trusted place of the moment (the beams' mode;
    a beam's is its candidates' mode) was that of every beam in more than `threshold` of its steps, the search returns
    to the state after that token and chooses the next one anew from the whole vocabulary, without penalty and without
    the tokens it had chosen there; at most C times per place, then one place earlier. (Huang et al., arXiv:2311.17911.)

    ``generate()`` is called as ever; where it is not told `num_beams`, `beams` are used. Prompts of a batch go back by
    themselves. With `weight` 0 and no `rollback` the call is left alone. What it adds is told by comparing it with
    plain beam search of the same width, the arm ``beam-5`` of ``mmfix eval run``, not with greedy decoding.

    The released code works in half precision, where column products overflow to inf or underflow to 0, so that most
    penalties are exactly 0, and falls back silently to no return on any error; it takes one place for the whole batch
    (right for one prompt only), refuses a single beam, and keeps the map of every step. Here the products are sums of
    logarithms in float64, one per column, and places are per prompt. With one candidate (its "fast" setting) the
    penalty cancels, here as there, and only the way back is left; the first step tries a token per beam even then. What
    was chosen is remembered by the words before it, not by the number of the beam.

    Passes per token: 1 + `candidates`, over `beams` rows; a return computes the answer again.

    Args:
        beams: beams where the call does not say; 0 leaves it alone.
        candidates: C, 1 to 50.
        sigma: factor on weights, above 0.
        weight: of the penalty, at least 0.
        threshold: r of the paper, at least 0.
        window: columns looked at and farthest way back, at least 1.
        grace: tokens that are rewarded for image attention and never returned to, at least 0.
        rollback: whether it goes back.

    Raises:
        MethodError: a value out of range.
    """

    beams: int = param(5, "beams where generate() is not told; 0 = as it is told", 0, 20)
    candidates: int = param(5, "next tokens of a beam that are tried", 1, 20)
    sigma: float = param(50.0, "factor on attention weights", 1.0, 100.0)
    weight: float = param(1.0, "strength of the penalty", 0.0, 10.0)
    threshold: int = param(15, "steps that agree on a place before it is returned to", 0, 50)
    window: int = param(512, "columns looked at, and the farthest way back", 1, 4096)
    grace: int = param(10, "first tokens that are rewarded for image attention instead", 0, 50)
    rollback: bool = param(True, "go back to a place that is trusted too much")

    def __post_init__(self) -> None:
        self.check("beams", 0, 1000)
        self.check("candidates", 1, 50)
        self.check("sigma", 1e-9, 1e6)
        self.check("weight", 0.0, 1e6)
        self.check("threshold", 0, 100_000)
        self.check("window", 1, 10**9)
        self.check("grace", 0, 100_000)

    def search(self) -> OverTrust | None:
        if self.weight == 0 and not self.rollback:
            return None
        return OverTrust(
            beams=self.beams or None, candidates=self.candidates, sigma=self.sigma, weight=self.weight,
            threshold=self.threshold, window=self.window, grace=self.grace, rollback=self.rollback,
        )  # fmt: skip
