"""The loop of focal search (HALC), in which words are decoded again from views of where their objects are.

A step is tried before it is taken. Where it would end a word that the detector knows, that word is decoded again: the
same prompt with the picture cut down to each field of view, then the words before, then as many tokens as the word had,
chosen by contrasts of the views. Answers stay as long as they were, so that all beams are at the same place. A session
follows one prompt at a time, so the prompt itself is computed anew after its views, on a new cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix import focal, scorers
from mmfix.focuser import Entry, Focuser
from mmfix.rows import Rows, each, output, said
from mmfix.words import Word

if TYPE_CHECKING:
    from mmfix.focusing import Focusing


class Run:
    """One ``generate()`` call.

    Args:
        search: of the block; focusers: one per prompt; the others as ``generate()`` gives them.
    """

    def __init__(
        self, search: Focusing, model: Any, ids: Tensor, config: Any, processors: Any, given: dict[str, Any],
        focusers: list[Focuser],
    ) -> None:  # fmt: skip
        assert search.call is not None
        self.search, self.rules, self.call = search, search.rules, search.call
        self.model, self.ids, self.config, self.processors = model, ids, config, processors
        self.focusers, self.count, self.prompt = focusers, len(ids) // len(focusers), ids.shape[1]
        self.blank, self.given = copy.deepcopy(given["past_key_values"]), given
        ends = getattr(config, "_eos_token_tensor", None)
        self.ends: list[int] = [] if ends is None else ends.flatten().tolist()
        self.rows = Rows(model, None, given)
        self.first = self.rows.prompt(ids, config)
        watch = search.session.watch
        self.maps = None if watch is None else dict(watch.maps)  # what the tower saw of the whole pictures

    @property
    def length(self) -> int:
        return max(one.beams.length for one in self.focusers if not one.beams.done)

    def run(self) -> Any:
        logits = self.first
        while True:
            log_probs = self._shares(logits, said(self.focusers, self.length))
            parts = {b: log_probs[b * self.count : (b + 1) * self.count] for b in self._live()}
            steps = {b: self.focusers[b].beams.step(part, self.focusers[b].ending) for b, part in parts.items()}
            if self._look({b: self.focusers[b].words(new, self.search.decode) for b, (new, _) in steps.items()}):
                self.rows.restart(self.focusers)
                logits = self.rows.newest(self.focusers)
                continue
            for b, (new, parents) in steps.items():
                self.focusers[b].take(new, parents, parts[b])
            self.search.steps += len(steps) * self.count
            if not self._live():
                return output(self.focusers, self.config, self.ids, self.rows.cache)
            self.rows.follow(self.focusers)
            logits = self.rows.newest(self.focusers)

    def _live(self) -> list[int]:
        return [b for b, one in enumerate(self.focusers) if not one.beams.done]

    def _shares(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Log-probabilities after the processors; of greedy decoding these see logits, of beam search not."""
        if self.count == 1:
            return torch.as_tensor(self.processors(ids, logits.clone())).log_softmax(-1)
        return torch.as_tensor(self.processors(ids, logits.log_softmax(-1)))

    def _look(self, words: dict[int, dict[int, Word]]) -> bool:
        """Decode these words again, by prompt and beam; whether there were any that the detector knows."""
        found: dict[int, dict[int, list[Tensor]]] = {}
        for b, i, word in [(b, i, word) for b, of_it in words.items() for i, word in of_it.items()]:
            one = self.focusers[b]
            one.looked.add(tuple(one.beams.tokens[i].tolist()))
            picture = self.call.picture(b)
            if picture is not None and word.text not in one.focuses:
                boxes = scorers.boxes(self.rules.detector, picture, word.text, self.rules.owner)
                one.focuses[word.text] = None if boxes is None else focal.focus(boxes, self.rules.most)
            focus = one.focuses.get(word.text)
            if focus is not None and picture is not None:
                views = focal.fields_of_view(focus.box, self.rules.ratio, self.rules.views)
                crops = torch.stack([focal.crop(picture, view) for view in views])
                found.setdefault(b, {})[i] = self._again(b, i, word, crops)
        if found:
            self._renew()
            self._choose(found)
        return bool(found)

    def _again(self, b: int, i: int, word: Word, crops: Tensor) -> list[Tensor]:
        """The answers of a beam, Int64[n] each, with its last word decoded from the views."""
        answers: list[Tensor] = []
        before = self.focusers[b].beams.tokens[i, : word.start]

        def loop(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            **given: Any,
        ) -> Tensor:  # fmt: skip
            rows = Rows(model, None, given)
            logits = rows.prompt(input_ids, generation_config)
            for _, part in rows.say(before.expand(len(crops), -1)):
                logits = part[:, -1]
            for way in focal.directions(logits, self.rules.candidates, self.rules.divergence):
                answer = self._decoded(rows, logits, way, b, i, word.start)
                if answer is not None:
                    answers.append(answer)
            return input_ids

        with self._aside():
            self.model.generate(
                **self.call.shown(b, crops), custom_generate=loop, num_beams=1, num_return_sequences=1,
                do_sample=False, use_cache=True, max_new_tokens=self.length,
            )  # fmt: skip
        self.search.views += len(crops)
        return answers

    def _decoded(self, rows: Rows, logits: Tensor, way: tuple[int, int], b: int, i: int, start: int) -> Tensor | None:
        """An answer whose last tokens are chosen by one view less another; None where no token is left to choose."""
        answer, length = self.focusers[b].beams.tokens[i, :start], self.length
        row = b * self.count + i
        fed = 0
        for place in range(start, length):
            ids = said(self.focusers, place)
            ids[row, self.prompt :] = answer
            contrast = focal.less(logits[way[0]], logits[way[1]], self.rules.weight)
            shares = self._shares(contrast.expand(len(ids), -1), ids)[row]
            shares[self.ends] = -torch.inf  # a word is decoded again, not the answer ended
            if bool(shares.isneginf().all()):
                break
            token = shares.argmax()[None]
            answer = torch.cat([answer, token])
            if place + 1 < length:
                tokens = token.expand(len(logits))[:, None]
                logits = rows.forward(tokens, torch.full_like(tokens, place), torch.ones_like(tokens).bool())[:, -1]
                fed += 1
        rows.crop(fed)
        return answer if len(answer) == length else None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Passes of the same prompts, which are no prompts of the caller's."""
        prompts = self.search.session.prompts
        try:
            yield
        finally:
            self.search.session.prompts = prompts

    def _renew(self) -> None:
        """Compute the prompts again, on a cache of their own."""
        watch = self.search.session.watch
        if watch is not None and self.maps:
            watch.maps, watch.fresh = dict(self.maps), True
        self.rows = Rows(self.model, None, {**self.given, "past_key_values": copy.deepcopy(self.blank)})
        with self._aside():
            self.rows.prompt(self.ids, self.config)

    def _choose(self, found: dict[int, dict[int, list[Tensor]]]) -> None:
        """New beams of the prompts whose words were decoded again."""
        pools = {b: self.focusers[b].pool(of_it) for b, of_it in found.items()}
        if self.rules.scorer is not None:
            pools = {b: self._best_matching(b, entries) for b, entries in pools.items()}
        for first in range(0, max(map(len, pools.values())), self.count):
            part = slice(first, first + self.count)
            self._complete({b: entries[part] for b, entries in pools.items() if entries[part]})
        for b, entries in pools.items():
            one = self.focusers[b]
            before = list(map(tuple, one.beams.tokens.tolist()))
            one.choose(entries, [answer for of_it in found[b].values() for answer in of_it])
            now = set(map(tuple, one.beams.tokens.tolist()))
            self.search.counts[0] += sum(before[i] not in now for i in found[b])
            self.search.counts[1] += len(found[b])

    def _best_matching(self, b: int, entries: list[Entry]) -> list[Entry]:
        """The answers that the scorer finds to fit the picture best, as many as there are beams."""
        picture = self.call.picture(b)
        assert picture is not None
        assert self.rules.scorer is not None
        texts = [self.search.decode(entry.tokens.tolist()) for entry in entries]
        fits = [scorers.match(self.rules.scorer, picture, text, self.rules.owner) for text in texts]
        order = sorted(range(len(entries)), key=lambda n: -fits[n])
        return [entries[n] for n in order[: self.count]]

    def _complete(self, group: dict[int, list[Entry]]) -> None:
        """Find what the tokens of answers add to their scores, at most one answer per beam of a prompt."""
        length, width = self.length, self.prompt
        start = min(len(entry.values) for entries in group.values() for entry in entries)
        if start == length:
            return
        ids = said(self.focusers, length)
        for b, entries in group.items():
            for k in range(self.count):
                ids[b * self.count + k, width:] = entries[min(k, len(entries) - 1)].tokens
        added = []

        def add(place: int, logits: Tensor) -> None:
            shares = self._shares(logits, ids[:, : width + place])
            added.append(shares.gather(1, ids[:, width + place, None]))

        if not start:
            add(0, self.first)
        gaps = each(self.focusers, lambda one: length if one.beams.done else 0)
        for first, logits in self.rows.say(ids[:, width:-1], gaps):
            for n in range(max(0, start - first - 1), logits.shape[1]):
                add(first + n + 1, logits[:, n])
        new = torch.cat(added, dim=1)
        for b, entries in group.items():
            for k, entry in enumerate(entries):
                entry.values = torch.cat([entry.values, new[b * self.count + k, len(entry.values) - start :]])
