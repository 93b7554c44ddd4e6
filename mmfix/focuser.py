"""Focal search (HALC) of one prompt, as values: its beams, and what becomes of words said anew. No model here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfix.beams import NEVER, Beams, Ending
from mmfix.focal import Focus
from mmfix.words import Word, ended

Answer = tuple[int, ...]


@dataclass(eq=False)
class Entry:
    """An answer that may become a beam: its tokens [n], what the first of them added to its score, and the score."""

    tokens: Tensor
    values: Tensor
    score: float | None = None


@dataclass(eq=False)
class Focuser:
    """One prompt's search.

    Attributes:
        values: Float32[N, n]: what each token added to the score of its beam.
        looked: answers of this length whose last word was looked up.
        focuses: word → where its object is; None for a word that is left alone.
        parents: Int64[N]: the beam that each beam continued at the last step.
    """

    ending: Ending
    beams: Beams
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    looked: set[Answer] = field(default_factory=set)
    focuses: dict[str, Focus | None] = field(default_factory=dict)
    parents: Tensor | None = None

    def take(self, beams: Beams, parents: Tensor, log_probs: Tensor) -> None:
        """Go on with the beams of a step, which was made of these log-probabilities."""
        added = log_probs[parents].gather(1, beams.tokens[:, -1:])
        self.values = torch.cat([self.values[parents], added], dim=1) if self.beams.length else added
        self.beams, self.parents, self.looked = beams, parents, set()

    def words(self, beams: Beams, decode: Callable[[Sequence[int]], str]) -> dict[int, Word]:
        """Beam → its last word, where the step to `beams` would end one that was not looked up."""
        rows = zip(self.beams.tokens.tolist(), self.beams.scores.tolist(), strict=True)
        known = {tuple(row): i for i, (row, score) in reversed(list(enumerate(rows))) if score > NEVER / 2}
        going = zip(beams.tokens.tolist(), beams.scores.tolist(), strict=True)
        longer = [(row, False) for row, score in going if score > NEVER / 2]
        longer += [(row.tolist(), True) for _, row in beams.finished if len(row) == beams.length]
        found: dict[int, Word] = {}
        for row, last in longer:
            before = tuple(row[:-1])
            word = ended(decode, before, row[-1], last) if before in known and before not in self.looked else None
            if word is not None:
                found[known[before]] = word
        return found

    def pool(self, found: dict[int, list[Tensor]]) -> list[Entry]:
        """Different answers that may become beams: those in `found` in place of their beams, the other beams.

        What a new answer adds to its score is known up to where it leaves the beam that it comes from.
        """
        entries: dict[Answer, Entry] = {}
        for i, (tokens, score) in enumerate(zip(self.beams.tokens, self.beams.scores.tolist(), strict=True)):
            if score <= NEVER / 2:
                continue
            for answer in found.get(i) or [tokens]:
                same = int((answer == tokens).int().cumprod(0).sum())
                whole = score if same == len(tokens) else None
                entries.setdefault(tuple(answer.tolist()), Entry(answer, self.values[i, :same], whole))
        return list(entries.values())

    def choose(self, entries: list[Entry], again: list[Tensor]) -> None:
        """Let the likeliest answers be the beams; `again`: those whose last word is not looked up any more.

        A beam for which no answer is left continues the best one, and counts from its next token on.
        """
        count = len(self.beams.tokens)
        scored = [(float(one.values.sum()) if one.score is None else one.score, one) for one in entries]
        best = sorted(scored, key=lambda pair: -pair[0])[:count]
        best += [(NEVER, best[0][1])] * (count - len(best))
        tokens = torch.stack([one.tokens for _, one in best])
        scores = self.beams.scores.new_tensor([score for score, _ in best])
        self.values = torch.stack([one.values for _, one in best])
        self.beams = dataclasses.replace(self.beams, tokens=tokens, scores=scores)
        self.looked |= {tuple(answer.tolist()) for answer in again}
