"""Running a search: ``generate()`` prepares inputs, cache, processors and stopping rules, and hands the loop over here.

It does so through its own ``custom_generate`` argument, given by the wrapper that is around ``generate()`` during a
block, so that nothing of transformers is replaced. Prompts of a batch go back by themselves: their rows then differ in
length, and the gap behind a shorter one's prompt is masked. The cache is cropped after each try, never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix.beams import Ending
from mmfix.errors import MmfixError, UnsupportedModel, UsageError
from mmfix.search import OverTrust, Searcher, Trail
from mmfix_kernels import AttentionCall, column_mass

if TYPE_CHECKING:
    from mmfix.session import Session

_OWN = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds")
_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_CHUNK = 16  # tokens computed again at a time


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


class Searching:
    """The search of one ``mitigate()`` block.

    Attributes:
        counts: decisions that the search changed, and decisions; for the report.
    """

    def __init__(self, session: Session, rules: OverTrust, owner: int) -> None:
        if session.family.cross_layers:
            raise UnsupportedModel(
                f"{session.family.name}: the picture's keys stand in the same cache as the answer's, from which a "
                "search takes tokens back; use another method"
            )
        self.session, self.rules, self.owner = session, rules, owner
        self.watch = Watch(session.family.num_layers - 1)
        self.counts = [0, 0]

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
        if self.rules.beams is not None and told is None:
            kwargs["num_beams"] = self.rules.beams
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
        count = generation_config.num_beams or 1
        _check(generation_config, model_kwargs)
        end = getattr(generation_config, "_eos_token_tensor", None)
        ending = Ending(
            stopping=lambda ids: stopping_criteria(ids, None),
            end_tokens=0 if end is None else int(end.numel()),
            length_penalty=1.0 if generation_config.length_penalty is None else generation_config.length_penalty,
            early_stopping=generation_config.early_stopping or False,
            longest=generation_config.max_length - input_ids.shape[1],
        )
        searchers = [Searcher(self.rules, ending, Trail.begin(ids, count)) for ids in input_ids[::count]]
        rows = _Rows(model, self.watch, model_kwargs)
        logits = rows.prompt(input_ids, generation_config)
        image = self._image()
        newest = logits.new_zeros(len(input_ids), rows.keys)
        while not all(one.beams.done for one in searchers):
            self._choose(searchers, rows, logits, newest, image, logits_processor)
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
        return _output(searchers, generation_config, input_ids, rows.cache)

    def _image(self) -> Tensor:
        """Bool[rows, prompt keys]: where the picture is."""
        spans = self.session.spans
        assert spans is not None
        return spans.image

    def _choose(
        self,
        searchers: list[Searcher],
        rows: _Rows,
        logits: Tensor,
        newest: Tensor,
        image: Tensor,
        processors: Any,
    ) -> None:
        """One decision of every prompt: its candidates are tried in passes of the whole batch."""
        count = len(logits) // len(searchers)
        log_probs = _processed(logits.log_softmax(-1), searchers, processors)
        parts = [slice(b * count, (b + 1) * count) for b in range(len(searchers))]
        tries = max(one.tries for one in searchers)
        candidates = log_probs.topk(max(tries, 1)).indices
        tried = [rows.attempt(candidates[:, c], searchers) for c in range(tries)]
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


class _Rows:
    """The batch as the model sees it: its cache, and which generated keys are each row's own."""

    def __init__(self, model: Any, watch: Watch, given: dict[str, Any]) -> None:
        self.model, self.watch, self.given = model, watch, given
        self.keys = 0  # of the prompt
        self.valid = torch.zeros(0, 0, dtype=torch.bool)  # [rows, generated keys]
        self.positions = self.mask = torch.zeros(0, dtype=torch.int64)
        self.cache: Any = None

    def prompt(self, ids: Tensor, config: Any) -> Tensor:
        """Compute the prompt; Float32[rows, V] of the first token."""
        output = self.model._prefill(ids, config, self.given)
        self.cache = output.past_key_values
        _check_cache(self.cache)
        logits: Tensor = output.logits[:, -1].float()
        rows, self.keys = len(logits), int(self.cache.get_seq_length())
        mask, positions = self.given.get("attention_mask"), self.given.get("position_ids")
        self.mask = torch.ones(rows, self.keys, dtype=torch.int64, device=logits.device) if mask is None else mask
        last = self.mask.sum(-1, keepdim=True) - 1 if positions is None else positions[..., -1:]
        self.positions = last + 1  # of the first token after the prompt: [rows, 1], or with axes in front
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=logits.device)
        return logits

    def newest(self, searchers: list[Searcher]) -> Tensor:
        """Compute every row's newest token, which its cache lacks; Float32[rows, V] of the next."""
        tokens = torch.cat([one.beams.tokens[:, -1:] for one in searchers])
        return self._forward(tokens, _each(searchers, lambda one: one.beams.length - 1)[:, None], _live(searchers))

    def attempt(self, tokens: Tensor, searchers: list[Searcher]) -> Tensor:
        """Compute one more token per row and take it back; its row of attention, Float32[rows, keys]."""
        self._forward(tokens[:, None], _each(searchers, lambda one: one.beams.length)[:, None], _live(searchers))
        self._crop(1)
        return self.watch.take()

    def follow(self, searchers: list[Searcher]) -> None:
        """Let the cache follow the beams that were continued."""
        count = len(self.valid) // len(searchers)
        stay = torch.arange(count, device=self.valid.device)
        parents = [stay if one.beams.done or one.parents is None else one.parents for one in searchers]
        self.cache.reorder_cache(torch.cat([b * count + order for b, order in enumerate(parents)]))

    def restart(self, searchers: list[Searcher]) -> None:
        """Compute the answers again from the end of the prompt, all but their newest tokens; short ones stand right."""
        self._crop(self.valid.shape[1])
        known = [one.beams.tokens[:, : 0 if one.beams.done else -1] for one in searchers]
        longest = max(tokens.shape[1] for tokens in known)
        lacking = [longest - tokens.shape[1] for tokens in known]
        pad = torch.nn.functional.pad
        tokens = torch.cat([pad(part, (n, 0)) for part, n in zip(known, lacking, strict=True)])
        gaps = torch.tensor(lacking, device=tokens.device).repeat_interleave(len(tokens) // len(searchers))
        places = torch.arange(longest, device=tokens.device) - gaps[:, None]
        step = _CHUNK if self.model._supports_logits_to_keep() else 1
        for first in range(0, longest, step):
            part = slice(first, min(first + step, longest))
            self._forward(tokens[:, part], places[:, part].clamp(min=0), places[:, part] >= 0, watched=False)

    def _forward(self, tokens: Tensor, places: Tensor, valid: Tensor, watched: bool = True) -> Tensor:
        """One pass; Float32[rows, V] of its last position.

        Args:
            tokens: Int64[rows, m]; places: their numbers in the answers; valid: whether they are part of them.
        """
        self.valid = torch.cat([self.valid, valid], dim=1)
        given = {name: value for name, value in self.given.items() if name not in (*_OWN, *_TYPES)}
        for name in _TYPES:
            if self.given.get(name) is not None:
                last = self.given[name][:, -1:]
                given[name] = (last if name == "token_type_ids" else torch.zeros_like(last)).expand_as(tokens)
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            past_key_values=self.cache,
            attention_mask=torch.cat([self.mask, self.valid.to(self.mask.dtype)], dim=1),
            use_cache=True,
            **given,
        )
        if self.given.get("position_ids") is not None:
            inputs["position_ids"] = self.positions + places
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = tokens.shape[1]
        self.watch.armed = watched
        try:
            logits: Tensor = self.model(**inputs, return_dict=True).logits
        finally:
            self.watch.armed = False
        return logits[:, -1].float()

    def _crop(self, tokens: int) -> None:
        if tokens:
            self.cache.crop(-tokens)
            self.valid = self.valid[:, : self.valid.shape[1] - tokens]


def _processed(log_probs: Tensor, searchers: list[Searcher], processors: Any) -> Tensor:
    """Log-probabilities after the processors, which see the whole batch: once per length that its answers have."""
    found = torch.empty_like(log_probs)
    count = len(log_probs) // len(searchers)
    for length in {one.beams.length for one in searchers}:
        seen = []
        for one in searchers:  # answers of other lengths are made as long; what comes out for them is not used
            ids = one.beams.sequences
            width = len(one.beams.prompt) + length
            seen.append(torch.cat([ids[:, :width], ids[:, -1:].expand(-1, max(0, width - ids.shape[1]))], dim=1))
        new = processors(torch.cat(seen), log_probs.clone())
        for b, one in enumerate(searchers):
            if one.beams.length == length:
                found[b * count : (b + 1) * count] = new[b * count : (b + 1) * count]
    return found


def _each(searchers: list[Searcher], value: Callable[[Searcher], int]) -> Tensor:
    """Int64[rows]: a number of each prompt, for all its beams."""
    first = searchers[0].beams.tokens
    return torch.tensor([value(one) for one in searchers], device=first.device).repeat_interleave(len(first))


def _live(searchers: list[Searcher]) -> Tensor:
    """Bool[rows, 1]: rows whose search is not over."""
    return _each(searchers, lambda one: not one.beams.done).bool()[:, None]


def _check(config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse what this search cannot do.

    Raises:
        UsageError: names what to leave out.
    """
    if config.do_sample:
        raise UsageError("the method searches with beams and draws nothing; set do_sample=False")
    if not config.use_cache or model_kwargs.get("past_key_values") is None:
        raise UsageError("the method tries candidates on one cache; leave use_cache at True")
    if config.return_dict_in_generate and (
        config.output_logits or config.output_attentions or config.output_hidden_states
    ):
        raise UsageError("steps of a search that goes back are no sequence; leave output_logits and its kin out")


def _check_cache(cache: Any) -> None:
    from transformers.cache_utils import DynamicLayer

    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if kinds:
        raise UnsupportedModel(
            f"the search takes tokens back from the cache, which {', '.join(kinds)} cannot; leave cache_implementation "
            "out, or use a model without sliding windows"
        )


def _output(searchers: list[Searcher], config: Any, ids: Tensor, cache: Any) -> Any:
    """What ``generate()`` returns of beam search."""
    best = [pair for one in searchers for pair in one.beams.best(config.num_return_sequences or 1)]
    pad, end = getattr(config, "_pad_token_tensor", None), getattr(config, "_eos_token_tensor", None)
    ending = -1 if end is None else int(end.flatten()[0])
    filler = ending if pad is None else int(pad)
    prompts = ids[:: len(searchers[0].beams.tokens)].repeat_interleave(config.num_return_sequences or 1, dim=0)
    answers = torch.nn.utils.rnn.pad_sequence([tokens for _, tokens in best], batch_first=True, padding_value=filler)
    sequences = torch.cat([prompts, answers], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

    scores = torch.tensor([score for score, _ in best], device=ids.device) if config.output_scores else None
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores, past_key_values=cache)
