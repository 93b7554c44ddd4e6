"""Running a search: ``generate()`` prepares inputs, cache, processors and stopping rules, and hands the loop over here.

It does so through its own ``custom_generate`` argument, given by the wrapper that is around ``generate()`` during a
block, so that nothing of transformers is replaced. What all searches share is :class:`Searching`; over-trust (OPERA) is
here, focal search (HALC) in :mod:`mmfix.focusing`, and the rows that both compute in :mod:`mmfix.rows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix.beams import Ending
from mmfix.errors import MmfixError, UnsupportedModel, UsageError
from mmfix.inputs import rows_for
from mmfix.rows import Rows, check, ending_of, output, processed
from mmfix.search import OverTrust, Searcher, Trail
from mmfix_kernels import AttentionCall, column_mass

if TYPE_CHECKING:
    from mmfix.focal import Refocus
    from mmfix.session import Session


class Watch:
    """The newest row of one layer: the largest weight over heads, divided by the row's sum; Float32[rows, keys]."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.armed = False
        self.row: Tensor | None = None

    def see(self, call: AttentionCall) -> None:
        if self.armed and call.query.shape[2] == 1:
            row = column_mass(call).mass.amax(1)
            self.row = row / row.sum(-1, keepdim=True)

    def take(self) -> Tensor:
        if self.row is None:
            raise MmfixError(f"layer {self.layer} computed no attention in this pass, so the search cannot read it")
        row, self.row = self.row, None
        return row


class Searching(ABC):
    """The search of one ``mitigate()`` block.

    Args:
        rules: of the search; `beams` of them where ``generate()`` is not told how many.
        owner: number of the method.

    Attributes:
        watch: what it reads of attention, or None.
        counts: decisions that the search changed, and decisions; for the report.
    """

    watch: Watch | None = None

    def __init__(self, session: Session, rules: OverTrust | Refocus, owner: int) -> None:
        if session.family.cross_layers:
            raise UnsupportedModel(
                f"{session.family.name}: the picture's keys stand in the same cache as the answer's, from which a "
                "search takes tokens back; use another method"
            )
        self.session, self.owner, self.beams = session, owner, rules.beams
        self.counts = [0, 0]

    @property
    @abstractmethod
    def passes(self) -> float:
        """Passes per generated token."""

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of ``generate()`` with the search in them.

        Raises:
            UsageError: another way of decoding was asked for.
        """
        for name in ("custom_generate", "assistant_model", "streamer", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise UsageError(f"{name} cannot go with a method that searches with beams of its own; leave it out")
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        told = kwargs.get("num_beams") or getattr(config, "num_beams", None)
        kwargs = {**kwargs, "custom_generate": self.run}
        if self.beams is not None and told is None:
            kwargs["num_beams"] = self.beams
        return kwargs

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The loop that ``generate()`` calls."""
        check(generation_config, model_kwargs)
        ending = ending_of(generation_config, stopping_criteria, input_ids.shape[1])
        return self.search(model, input_ids, logits_processor, generation_config, ending, model_kwargs)

    @abstractmethod
    def search(
        self, model: Any, input_ids: Tensor, processors: Any, config: Any, ending: Ending, given: dict[str, Any]
    ) -> Any:
        """The same; `given` is what the model is called with, `ending` when hypotheses end."""


class OverTrusting(Searching):
    """OPERA's search."""

    watch: Watch

    def __init__(self, session: Session, rules: OverTrust, owner: int) -> None:
        super().__init__(session, rules, owner)
        self.rules = rules
        self.watch = Watch(session.family.num_layers - 1)

    @property
    def passes(self) -> float:
        return 1.0 + self.rules.candidates

    def search(
        self, model: Any, input_ids: Tensor, processors: Any, config: Any, ending: Ending, given: dict[str, Any]
    ) -> Any:
        count = config.num_beams or 1
        searchers = [Searcher(self.rules, ending, Trail.begin(ids, count)) for ids in input_ids[::count]]
        rows = Rows(model, self.watch, given)
        # Edits are made for the rows of a prompt: where no other method has any, one row stands for its beams.
        alone = len(self.session.methods) == 1 and not self.session.telemetry
        logits = rows.prompt(input_ids, config, count if alone else 1)
        image = rows_for(self._image(), len(input_ids))
        newest = logits.new_zeros(len(input_ids), rows.keys)
        while not all(one.beams.done for one in searchers):
            self._choose(searchers, rows, logits, newest, image, processors)
            if all(one.beams.done for one in searchers):
                break
            if any(one.again for one in searchers):
                rows.restart(searchers)
            else:
                rows.follow(searchers)
            logits = rows.newest(searchers)
            newest = self.watch.take()
        for one in searchers:
            self.counts[0] += one.changed
            self.counts[1] += one.seen
        return output(searchers, config, input_ids, rows.cache)

    def _image(self) -> Tensor:
        """Bool[rows, prompt keys]: where the picture is."""
        spans = self.session.spans
        assert spans is not None
        return spans.image

    def _choose(
        self,
        searchers: list[Searcher],
        rows: Rows,
        logits: Tensor,
        newest: Tensor,
        image: Tensor,
        processors: Any,
    ) -> None:
        """One decision of every prompt: its candidates are tried in passes of the whole batch."""
        count = len(logits) // len(searchers)
        log_probs = processed(logits.log_softmax(-1), searchers, processors)
        parts = [slice(b * count, (b + 1) * count) for b in range(len(searchers))]
        tries = max(one.tries for one in searchers)
        candidates = log_probs.topk(max(tries, 1)).indices
        tried = []
        for c in range(tries):
            rows.attempt(candidates[:, c], searchers)
            tried.append(self.watch.take())
        for one, part in zip(searchers, parts, strict=True):
            if one.beams.done:
                continue
            length = one.beams.length
            own = newest[part, newest.shape[1] - length :]
            if not one.tries:
                one.decide(log_probs[part], own, None, None, None)
                continue
            found = torch.stack([row[part] for row in tried[: one.tries]], dim=1)
            looked = (found[..., : image.shape[1]] * image[part][:, None]).sum(-1)
            of_it = found[..., found.shape[-1] - length - 1 :]
            one.decide(log_probs[part], own, candidates[part, : one.tries], of_it, looked)
