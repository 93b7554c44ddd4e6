"""The rows of a search as the model sees them: their cache, tokens tried and taken back, answers computed again.

Prompts of a batch go back by themselves: their rows then differ in length, and the gap behind a shorter one's prompt is
masked. The cache grows in place and is cropped after each try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmfix.beams import Beams, Ending
from mmfix.errors import UnsupportedModel, UsageError
from mmfix.growing import GrowingLayer

_OWN = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds")
_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_CHUNK = 16  # tokens computed again at a time


class Newest(Protocol):
    """What is watched of a pass: armed before it, when the pass is one that counts."""

    armed: bool


class Answering(Protocol):
    """The search of one prompt: its beams, and Int64[N] with the beam that each of them continued at the last step."""

    @property
    def beams(self) -> Beams: ...

    @property
    def parents(self) -> Tensor | None: ...


class Rows:
    """The batch as the model sees it: its cache, and which generated keys are each row's own.

    Args:
        watch: armed for passes that compute newest tokens, or None.
        given: what ``generate()`` gives its loop.
    """

    def __init__(self, model: Any, watch: Newest | None, given: dict[str, Any]) -> None:
        self.model, self.watch, self.given = model, watch, given
        self.keys = 0  # of the prompt
        self.valid = torch.zeros(0, 0, dtype=torch.bool)  # [rows, generated keys]
        self.positions = self.mask = torch.zeros(0, dtype=torch.int64)
        self.cache: Any = None

    def prompt(self, ids: Tensor, config: Any, beams: int = 1) -> Tensor:
        """Compute the prompt; Float32[rows, V] of the first token.

        Args:
            beams: rows that each prompt has, all alike; it is computed once, where every input has a row per row.
        """
        given = self._every(beams, len(ids))
        alike = 1 if given is self.given else beams
        output = self.model._prefill(ids[::alike], config, given)
        self.cache = output.past_key_values
        check_cache(self.cache)
        if alike > 1:
            self.cache.batch_repeat_interleave(alike)
        self.cache.layers[:] = [GrowingLayer.of(layer) for layer in self.cache.layers]
        logits: Tensor = output.logits[:, -1].float().repeat_interleave(alike, dim=0)
        rows, self.keys = len(logits), int(self.cache.get_seq_length())
        mask, positions = self.given.get("attention_mask"), self.given.get("position_ids")
        self.mask = torch.ones(rows, self.keys, dtype=torch.int64, device=logits.device) if mask is None else mask
        last = self.mask.sum(-1, keepdim=True) - 1 if positions is None else positions[..., -1:]
        self.positions = last + 1  # of the first token after the prompt: [rows, 1], or with axes in front
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=logits.device)
        return logits

    def _every(self, beams: int, rows: int) -> dict[str, Any]:
        """What was given, for every `beams`-th row; all of it where inputs are not by rows, or differ among them."""
        cache = self.given.get("past_key_values")
        if beams == 1 or cache is None or cache.get_seq_length():
            return self.given
        thinned = {
            name: value if value is cache else _thinned(value, beams, rows) for name, value in self.given.items()
        }
        return self.given if any(value is NotImplemented for value in thinned.values()) else thinned

    def newest(self, answers: Sequence[Answering]) -> Tensor:
        """Compute every row's newest token, which its cache lacks; Float32[rows, V] of the next."""
        tokens = torch.cat([one.beams.tokens[:, -1:] for one in answers])
        return self.forward(tokens, each(answers, lambda one: one.beams.length - 1)[:, None], live(answers))[:, -1]

    def attempt(self, tokens: Tensor, answers: Sequence[Answering]) -> None:
        """Compute one more token per row and take it back; the pass is watched."""
        self.forward(tokens[:, None], each(answers, lambda one: one.beams.length)[:, None], live(answers))
        self.crop(1)

    def follow(self, answers: Sequence[Answering]) -> None:
        """Let the cache follow the beams that were continued."""
        count = len(self.valid) // len(answers)
        stay = torch.arange(count, device=self.valid.device)
        parents = [stay if one.beams.done or one.parents is None else one.parents for one in answers]
        order = torch.cat([b * count + own for b, own in enumerate(parents)])
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            self.cache.reorder_cache(order)

    def restart(self, answers: Sequence[Answering]) -> None:
        """Compute the answers again from the end of the prompt, all but their newest tokens; short ones stand right."""
        known = [one.beams.tokens[:, : 0 if one.beams.done else -1] for one in answers]
        longest = max(tokens.shape[1] for tokens in known)
        lacking = [longest - tokens.shape[1] for tokens in known]
        pad = torch.nn.functional.pad
        tokens = torch.cat([pad(part, (n, 0)) for part, n in zip(known, lacking, strict=True)])
        gaps = torch.tensor(lacking, device=tokens.device).repeat_interleave(len(tokens) // len(answers))
        for _ in self.say(tokens, gaps):
            pass

    def say(self, tokens: Tensor, gaps: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Compute answers from the end of the prompt, piece by piece.

        Args:
            tokens: Int64[rows, n]; gaps: Int64[rows], tokens at the start of each row that are not part of it.

        Yields:
            (k, Float32[rows, m, V]): what tokens k + 1 to k + m are predicted to be, counted from 0.
        """
        self.crop(self.valid.shape[1])
        rows, length = tokens.shape
        gaps = torch.zeros(rows, dtype=torch.int64, device=tokens.device) if gaps is None else gaps
        places = torch.arange(length, device=tokens.device) - gaps[:, None]
        step = _CHUNK if self.model._supports_logits_to_keep() else 1
        for first in range(0, length, step):
            part = slice(first, min(first + step, length))
            yield first, self.forward(tokens[:, part], places[:, part].clamp(min=0), places[:, part] >= 0, False)

    def forward(self, tokens: Tensor, places: Tensor, valid: Tensor, watched: bool = True) -> Tensor:
        """One pass; Float32[rows, m, V].

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
        if self.watch is not None:
            self.watch.armed = watched
        try:
            logits: Tensor = self.model(**inputs, return_dict=True).logits
        finally:
            if self.watch is not None:
                self.watch.armed = False
        return logits.float()

    def crop(self, tokens: int) -> None:
        """Take the last tokens back."""
        if tokens:
            self.cache.crop(-tokens)
            self.valid = self.valid[:, : self.valid.shape[1] - tokens]


def _thinned(value: Any, beams: int, rows: int) -> Any:
    """Every `beams`-th entry of what has one for each of `rows`; NotImplemented where neighbours are not alike."""
    if isinstance(value, Mapping):  # pictures that were encoded ahead, by modality
        found = {name: _pooled(one, beams, rows) for name, one in value.items()}
        return NotImplemented if any(one is NotImplemented for one in found.values()) else found
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and not value.ndim):
        return value
    if len(value) != rows or not all(isinstance(one, Tensor) for one in value):
        return NotImplemented
    alike = all(torch.equal(value[n], value[n - n % beams]) for n in range(rows))
    return value[::beams] if alike else NotImplemented


def _pooled(encoded: Any, beams: int, rows: int) -> Any:
    """Pictures encoded ahead, of which models read ``pooler_output`` (and features of deeper layers, not served)."""
    if encoded is None:
        return None
    if encoded.get("pooler_output") is None or encoded.get("deepstack_features") is not None:
        return NotImplemented
    found = _thinned(encoded["pooler_output"], beams, rows)
    return found if found is NotImplemented else type(encoded)(pooler_output=found)


def processed(log_probs: Tensor, answers: Sequence[Answering], processors: Any) -> Tensor:
    """Log-probabilities after the processors, which see the whole batch: once per length that its answers have."""
    found = torch.empty_like(log_probs)
    count = len(log_probs) // len(answers)
    for length in {one.beams.length for one in answers}:
        new = processors(said(answers, length), log_probs.clone())
        for b, one in enumerate(answers):
            if one.beams.length == length:
                found[b * count : (b + 1) * count] = new[b * count : (b + 1) * count]
    return found


def said(answers: Sequence[Answering], length: int) -> Tensor:
    """Int64[rows, T + length]: prompts and answers, those of another length made as long."""
    seen = []
    for one in answers:
        ids, width = one.beams.sequences, len(one.beams.prompt) + length
        seen.append(torch.cat([ids[:, :width], ids[:, -1:].expand(-1, max(0, width - ids.shape[1]))], dim=1))
    return torch.cat(seen)


def each(answers: Sequence[Answering], value: Callable[[Answering], int]) -> Tensor:
    """Int64[rows]: a number of each prompt, for all its beams."""
    first = answers[0].beams.tokens
    return torch.tensor([value(one) for one in answers], device=first.device).repeat_interleave(len(first))


def live(answers: Sequence[Answering]) -> Tensor:
    """Bool[rows, 1]: rows whose search is not over."""
    return each(answers, lambda one: not one.beams.done).bool()[:, None]


def ending_of(config: Any, stopping: Any, prompt: int) -> Ending:
    """When hypotheses end, as ``generate()`` was told; `prompt`: its length."""
    end = getattr(config, "_eos_token_tensor", None)
    return Ending(
        stopping=lambda ids: stopping(ids, None),
        end_tokens=0 if end is None else int(end.numel()),
        length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
        early_stopping=config.early_stopping or False,
        longest=config.max_length - prompt,
    )


def check(config: Any, model_kwargs: dict[str, Any]) -> None:
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


def check_cache(cache: Any) -> None:
    from transformers.cache_utils import DynamicLayer

    able = (DynamicLayer, GrowingLayer)
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in able})
    if kinds:
        raise UnsupportedModel(
            f"the search takes tokens back from the cache, which {', '.join(kinds)} cannot; leave cache_implementation "
            "out, or use a model without sliding windows"
        )


def output(answers: Sequence[Answering], config: Any, ids: Tensor, cache: Any) -> Any:
    """What ``generate()`` returns of beam search."""
    best = [pair for one in answers for pair in one.beams.best(config.num_return_sequences or 1)]
    pad, end = getattr(config, "_pad_token_tensor", None), getattr(config, "_eos_token_tensor", None)
    ending = -1 if end is None else int(end.flatten()[0])
    filler = ending if pad is None else int(pad)
    prompts = ids[:: len(answers[0].beams.tokens)].repeat_interleave(config.num_return_sequences or 1, dim=0)
    tokens = torch.nn.utils.rnn.pad_sequence([found for _, found in best], batch_first=True, padding_value=filler)
    sequences = torch.cat([prompts, tokens], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

    scores = torch.tensor([score for score, _ in best], device=ids.device) if config.output_scores else None
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores, past_key_values=cache)
