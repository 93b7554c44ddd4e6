"""HALC: words decoded again from views of what they name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmfix import scorers
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.focal import Refocus
from mmfix.method import Method
from mmfix.registry import param, register


@register("halc", title="HALC", paper="arXiv:2403.00425", kind="search", passes=2)
@dataclass(frozen=True, kw_only=True)
class HALC(Method):
    """Adaptive focal-contrast decoding: a word is said again after looking at its object from several distances.

    *HALC: Object Hallucination Reduction via Adaptive Focal-Contrast Decoding* (arXiv:2403.00425). Where beam search
    would end a word, a detector of the user's own, see :mod:`mmfix.scorers`, says where its object is. Around the
    smallest box, `views` fields of view are cut out: one nearer, the box, and ever wider ones (half-extents change by
    ``ratio / 2`` of width and height, at most 0.8 for the nearer one). The model, shown each of them in the place of
    the picture, says what it said before the word, and with logits l_i of view i and p_i their softmax::

        M = (p_i + p_j) / 2        D_ij = (KL(M || p_i) + KL(M || p_j)) / 2        ("reversed", as released)
        z = l_i - weight * l_j     both ways for the `candidates` / 2 pairs of largest D

    Each z says the word anew, and the beams of all their answers, without doubles, are chosen by a function of the
    user's own (pixels, answer) → number, which is BLIP's image-text score in the paper; without a `scorer`, by the
    model's own log-probability.

    What the paper leaves open, and what is done here: a word is a run of letters and digits that the next token ends;
    one without boxes is looked at in the centre of the picture, [0.2, 0.8] each way, and one with more than `most`
    boxes or of which the detector returns None is left alone. Pairs are chosen at the word's first token and kept for
    its others. A word is decoded again in as many tokens as it had, none of which ends the answer; the word that comes
    of it, whether the same or another, is not looked up again. Scores of beams stay the model's log-probabilities,
    summed anew for tokens that changed, so that beam search goes on as ever; where fewer different answers are left
    than beams, the best one is continued in more than one way.

    The released code leaves out words at random (a rate of 0.3, which its author sets to 0 to reproduce the paper),
    sets the global seed, and calls D Jensen-Shannon divergence, which has KL(p || M); `divergence` "jensen-shannon" is
    that. Here no word is left out, nothing is drawn, and pixels of all views are normalised like the picture's. It
    tags parts of speech to find nouns; here the detector decides, by returning None for other words.

    ``generate()`` is called as ever, with the model's processor given to ``mitigate()``; where it is not told
    `num_beams`, `beams` are used. A detector that returns None for every word gives plain beam search; with one beam,
    greedy decoding. The control is plain beam search of the same width, the arm ``beam-3`` of ``mmfix eval run``.
    Passes per token: 1, and for each word of a beam that is looked up `views`, over a prompt of their own, with the
    prompt and its answers computed again.

    Args:
        detector: name of a registered function (pixels, word) → boxes, or None for a word not to look up.
        scorer: name of a registered function (pixels, text) → number; None chooses by log-probability.
        beams: beams where the call does not say, at least 0; 0 leaves it alone.
        views: fields of view, 2 to 16.
        ratio: lambda, in (0, 4].
        candidates: k, even, at most ``views * (views - 1)``.
        weight: alpha, of the subtracted view, at least 0.
        most: boxes above which a word is left alone, at least 1.
        divergence: "reversed" or "jensen-shannon".

    Raises:
        MethodError: a value out of range; no detector, one that is not registered, or no processor, when a model is
            entered.
        UnsupportedModel: pictures are packed or cut into tiles, or are more than one per prompt.
        UsageError: sampling, streaming, or a cache of the caller's.
        MmfixError: the detector or scorer raised an error, or returned something else.
    """

    detector: str | None = param(None, "name of a registered function that finds a word's boxes")
    scorer: str | None = param(None, "name of a registered function that matches texts with the picture")
    beams: int = param(3, "beams where generate() is not told; 0 = as it is told", 0, 20)
    views: int = param(4, "fields of view", 2, 8)
    ratio: float = param(0.6, "how much wider each view is than the one before", 0.1, 2.0)
    candidates: int = param(4, "words that are decoded again per beam; even", 2, 12)
    weight: float = param(0.05, "of the subtracted view", 0.0, 1.0)
    most: int = param(3, "boxes above which a word is left alone", 1, 20)
    divergence: str = param("reversed", "'reversed' as released, or 'jensen-shannon'")

    def __post_init__(self) -> None:
        self.check("beams", 0, 1000)
        self.check("views", 2, 16)
        self.check("ratio", 1e-9, 4.0)
        self.check("candidates", 2, self.views * (self.views - 1))
        self.check("weight", 0.0, 100.0)
        self.check("most", 1, 100_000)
        if self.candidates % 2:
            raise MethodError(f"halc.candidates={self.candidates}: give an even number; pairs are used both ways")
        if self.divergence not in ("reversed", "jensen-shannon"):
            raise MethodError(f"halc.divergence={self.divergence!r}: choose 'reversed' or 'jensen-shannon'")

    def prepare(self, family: Family) -> Method:
        scorers.get(self.detector, "boxes", "halc", "detector")
        if self.scorer is not None:
            scorers.get(self.scorer, "match", "halc")
        return dataclasses.replace(self)

    def search(self) -> Refocus:
        return Refocus(
            detector=self.detector or "", scorer=self.scorer, beams=self.beams or None, views=self.views,
            ratio=self.ratio, candidates=self.candidates, weight=self.weight, most=self.most,
            divergence="reversed" if self.divergence == "reversed" else "jensen-shannon", owner="halc",
        )  # fmt: skip
