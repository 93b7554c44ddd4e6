"""Beam search of one prompt, a step at a time, as values: a step gives new beams and leaves the old ones as they were.

Scores are sums of log-probabilities in float32. Ending follows ``generate()``: the same candidates are kept, the same
hypotheses end, and the search stops at the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -1.0e9  # the score of a beam that stands for nothing yet


@dataclass(frozen=True, kw_only=True, eq=False)
class Ending:
    """When hypotheses end.

    Args:
        stopping: Int64[K, T] of prompt and answer → Bool[K].
        end_tokens: how many tokens end an answer; so many candidates more are kept.
        length_penalty: power of the length by which a finished score is divided.
        early_stopping: as in ``generate()``: True, False or "never".
        longest: tokens that an answer may have.
    """

    stopping: Callable[[Tensor], Tensor]
    end_tokens: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    longest: int = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Beams:
    """The beams of one prompt after n tokens.

    Args:
        prompt: Int64[T], as the stopping rules see it.
        tokens: Int64[N, n]: the answers so far.
        scores: Float32[N], best first.
        finished: (score divided by length, tokens) of at most N answers that ended, best first.
        done: whether the search is over.
    """

    prompt: Tensor
    tokens: Tensor
    scores: Tensor
    finished: tuple[tuple[float, Tensor], ...] = ()
    done: bool = False

    @staticmethod
    def begin(prompt: Tensor, count: int) -> Beams:
        """`count` beams before the first token, of which one counts."""
        scores = torch.full((count,), NEVER, device=prompt.device)
        scores[0] = 0.0
        return Beams(prompt=prompt, tokens=prompt.new_empty(count, 0), scores=scores)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def sequences(self) -> Tensor:
        """Int64[N, T + n]: prompt and answer of every beam."""
        return torch.cat([self.prompt.expand(len(self.tokens), -1), self.tokens], dim=1)

    def step(self, log_probs: Tensor, ending: Ending) -> tuple[Beams, Tensor]:
        """The beams one token longer, and Int64[N] with the beam that each of them continues.

        Args:
            log_probs: Float32[N, V] of the next token; -inf for tokens that are out of the question.
        """
        count, vocabulary = log_probs.shape
        wide = max(2, 1 + ending.end_tokens) * count
        values, places = (log_probs + self.scores[:, None]).flatten().topk(min(wide, log_probs.numel()))
        parents, chosen = places // vocabulary, places % vocabulary
        longer = torch.cat([self.tokens[parents], chosen[:, None]], dim=1)
        ended = ending.stopping(torch.cat([self.prompt.expand(len(longer), -1), longer], dim=1))
        scores, running = torch.where(ended, values + NEVER, values).topk(count)
        finished = self._with(longer[:count], values[:count], ended[:count], ending)
        new = Beams(prompt=self.prompt, tokens=longer[running], scores=scores, finished=finished)
        return dataclasses.replace(new, done=bool(ended.all()) or not new._open(ending)), parents[running]

    def _with(self, longer: Tensor, values: Tensor, ended: Tensor, ending: Ending) -> tuple[tuple[float, Tensor], ...]:
        """The finished answers with those that end now."""
        count = len(self.tokens)
        if ending.early_stopping is True and len(self.finished) == count:
            return self.finished
        weight = float(longer.shape[1] ** ending.length_penalty)
        scored = [(float(values[k]) / weight, longer[k]) for k in range(count) if ended[k] and values[k].isfinite()]
        return tuple(sorted([*self.finished, *scored], key=lambda pair: -pair[0])[:count])

    def _open(self, ending: Ending) -> bool:
        """Whether a running beam may still end better than the worst finished one."""
        if len(self.finished) < len(self.tokens):
            return True
        if ending.early_stopping is True:
            return False
        patient = ending.early_stopping == "never" and ending.length_penalty > 0.0
        length = ending.longest if patient else self.length
        return bool(float(self.scores[0]) / length**ending.length_penalty > self.finished[-1][0])

    def best(self, count: int) -> list[tuple[float, Tensor]]:
        """The `count` best answers that ended, of which there is at least one when the search is done."""
        found = list(self.finished[:count])
        return found + [found[-1]] * (count - len(found))
