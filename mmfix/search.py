"""Searches that a method may put in the place of beam search: what they are, and how they decide. No model here.

Over-trust (OPERA, arXiv:2311.17911). Let w_ij be the attention of generated token i to generated token j, of the last
layer, the largest over heads, its row divided by its sum over all keys. A token that all later ones look at is one that
the model trusts too much; how much is the column product, in logarithms

    log s_j = sum over i >= j of log(sigma w_ij)

which needs one running sum per column and the newest row, never a map.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfix.beams import NEVER, Beams, Ending

SCALE = math.log(1e-7)  # of a column product, so that it compares with logits
LARGEST = 600.0  # logarithm of the largest penalty: finite in float64


@dataclass(frozen=True, kw_only=True)
class OverTrust:
    """A beam search whose candidates are penalised by the trust they put into a single token.

    Args:
        beams: where ``generate()`` is not told how many; None leaves it at what it is told.
        candidates: next tokens of a beam that are tried, each with a pass.
        sigma: factor on attention weights.
        weight: of the penalty on the logits.
        threshold: a place is returned to when every beam found it the most trusted more than so often.
        window: columns looked at, and the farthest way back.
        grace: tokens at the start of an answer that are rewarded for image attention instead, and never returned to.
        rollback: whether it goes back at all.
    """

    beams: int | None = 5
    candidates: int = 5
    sigma: float = 50.0
    weight: float = 1.0
    threshold: int = 15
    window: int = 512
    grace: int = 10
    rollback: bool = True


def longer_columns(columns: Tensor, row: Tensor, sigma: float) -> Tensor:
    """Float64[…, n + 1]: log s_j with one more row.

    Args:
        columns: Float64[…, n]: log s_j up to now.
        row: [..., n + 1]: weights of the newest token on the generated ones, itself last.
    """
    new = (sigma * row.double()).log()
    return torch.cat([columns + new[..., :-1], new[..., -1:]], dim=-1)


def trusted(columns: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The largest of the last `window` columns, Float64[…], and its place among all, Int64[…]."""
    seen = columns[..., -window:]
    place = seen.argmax(-1)
    return seen.gather(-1, place[..., None])[..., 0], place + columns.shape[-1] - seen.shape[-1]


def penalties(columns: Tensor, image: Tensor, rules: OverTrust) -> tuple[Tensor, Tensor]:
    """phi, Float64[…], of candidates whose rows are already in their `columns`, and the place that each trusts most.

    phi = 1e-7 max_j s_j; for the first `grace` tokens minus the image's share of the row, which rewards.
    """
    peak, place = trusted(columns, rules.window)
    if columns.shape[-1] <= rules.grace:
        return -image.double(), place
    return (peak + SCALE).clamp(max=LARGEST).exp(), place


def penalised(log_probs: Tensor, candidates: Tensor, phi: Tensor, weight: float) -> Tensor:
    """Float32[N, V]: log-probabilities among each beam's candidates after their penalty; -inf for all other tokens."""
    known = log_probs.gather(1, candidates)
    dead = known.isneginf()
    lowered = (known.double() - weight * phi).masked_fill(dead, -math.inf)
    shares = lowered.log_softmax(-1).clamp(min=NEVER).masked_fill(dead, -math.inf)
    return torch.full_like(log_probs, -math.inf).scatter(1, candidates, shares.to(log_probs.dtype))


@dataclass(frozen=True, eq=False)
class Trail:
    """The beams of one prompt, with what each of them has trusted.

    Args:
        columns: Float64[N, n]: log s_j of the generated tokens (before the newest one's own pass, without its row).
        places: Int64[N, k]: the most trusted place at each step, as the beam's own past saw it.
    """

    beams: Beams
    columns: Tensor
    places: Tensor

    @staticmethod
    def begin(prompt: Tensor, count: int) -> Trail:
        beams = Beams.begin(prompt, count)
        return Trail(beams, beams.scores.new_zeros(count, 0, dtype=torch.float64), beams.tokens)

    def step(self, log_probs: Tensor, ending: Ending) -> tuple[Trail, Tensor]:
        """One token longer, and the beams that were continued; as :meth:`Beams.step`."""
        beams, parents = self.beams.step(log_probs, ending)
        return Trail(beams, self.columns[parents], self.places[parents]), parents


Choice = tuple[tuple[int, ...], int]  # what a beam had said, and the token it chose


@dataclass(eq=False)
class Searcher:
    """One prompt's search with its way back.

    Attributes:
        history: the trail before each token was chosen; choices: what was chosen there.
        attempts: how often each place was returned to; rejected: choices that must not be made again there.
        again: whether the next token is one that is chosen anew.
        parents: Int64[N]: the beam that each beam continued at the last step.
        changed, seen: steps whose best candidate of some beam changed, or that went back; and steps.
    """

    rules: OverTrust
    ending: Ending
    trail: Trail
    history: list[Trail] = field(default_factory=list)
    choices: list[set[Choice]] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    rejected: set[Choice] = field(default_factory=set)
    again: bool = False
    parents: Tensor | None = None
    changed: int = 0
    seen: int = 0

    @property
    def beams(self) -> Beams:
        return self.trail.beams

    @property
    def tries(self) -> int:
        """Candidates per beam at this step; all beams are one at the first, which must give each of them a token."""
        if self.again or self.beams.done:
            return 0
        return self.rules.candidates if self.beams.length else max(self.rules.candidates, len(self.beams.tokens))

    def columns(self, row: Tensor) -> Tensor:
        """Float64[N, n]: columns with the newest token's row [N, n]; nothing to add before the first token."""
        return longer_columns(self.trail.columns, row, self.rules.sigma) if self.beams.length else self.trail.columns

    def decide(
        self, log_probs: Tensor, row: Tensor, candidates: Tensor | None, rows: Tensor | None, image: Tensor | None
    ) -> bool:
        """Choose the next token, or go back; whether it went back.

        Args:
            log_probs: Float32[N, V] of the next token.
            row: [N, n]: attention of the newest token to the generated ones.
            candidates: Int64[N, C]; rows: [N, C, n + 1] and image: [N, C], the attention of each candidate to the
                generated tokens (itself last), and to the image. None where a token is chosen anew.
        """
        before, columns = self.trail, self.columns(row)
        if candidates is None:
            self._take(dataclasses.replace(before, columns=columns), self._without_rejected(log_probs), before)
            self.again = False
            return False
        assert rows is not None
        assert image is not None
        phi, places = penalties(longer_columns(columns[:, None].expand(-1, rows.shape[1], -1), rows, self.rules.sigma),
                                image, self.rules)  # fmt: skip
        place = places.mode(-1).values
        now = Trail(before.beams, columns, torch.cat([before.places, place[:, None]], dim=1))
        back = self._way_back(now.places, int(place.mode().values))
        self.seen += 1
        if back is not None:
            self._return_to(back)
            self.changed += 1
            return True
        new = penalised(log_probs, candidates, phi, self.rules.weight)
        self.changed += int(bool((new.argmax(-1) != log_probs.argmax(-1)).any()))
        self._take(now, new, before)
        return False

    def _take(self, now: Trail, log_probs: Tensor, before: Trail) -> None:
        """Choose by these log-probabilities, and remember how it stood `before`."""
        self.trail, self.parents = now.step(log_probs, self.ending)
        self.history.append(before)
        self.choices.append({(tuple(row[:-1]), row[-1]) for row in self.beams.tokens.tolist()})

    def _way_back(self, places: Tensor, trusted: int) -> int | None:
        """How many tokens stay when the most trusted place is returned to; None when it is not."""
        rules, length = self.rules, self.beams.length
        if not rules.rollback or trusted < rules.grace:
            return None
        if not bool(((places == trusted).sum(-1) > rules.threshold).all()):
            return None
        for kept in (trusted + 1, trusted):
            if 0 < kept < length and length - kept <= rules.window and self.attempts[kept] < rules.candidates:
                return kept
        return None

    def _return_to(self, kept: int) -> None:
        self.attempts[kept] += 1
        self.rejected |= self.choices[kept]
        self.trail = self.history[kept]
        del self.history[kept:], self.choices[kept:]
        self.again = True

    def _without_rejected(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities among the tokens that were not chosen before after the same words."""
        left = log_probs.clone()
        for n, said in enumerate(map(tuple, self.beams.tokens.tolist())):
            tokens = [token for words, token in self.rejected if words == said]
            left[n, tokens] = -math.inf
        return left.log_softmax(-1)
