"""One running mitigation: what the hooks of a ``mitigate()`` block share, pass by pass."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mmfix import measuring, passes, pieces
from mmfix import prefix as prefixes
from mmfix import spans as token_spans
from mmfix.branchrows import Rows as BranchRows
from mmfix.branchrows import trimmed
from mmfix.conversation import Conversation, image_tokens
from mmfix.errors import MmfixError, MmfixWarning
from mmfix.expand import Expander
from mmfix.families import Family
from mmfix.inputs import Inputs
from mmfix.layers import LayerState
from mmfix.measuring import Measuring
from mmfix.method import Method
from mmfix.mixing import Mix
from mmfix.overlooking import Overlooking
from mmfix.passes import Kind, Pass
from mmfix.positions import rewriting, rewritten, with_positions
from mmfix.readouts import Readouts
from mmfix.searching import Searching
from mmfix.segments import Markers
from mmfix.spans import TokenSpans
from mmfix.steerer import Steering
from mmfix.textonly import TextOnly
from mmfix.turn import Turn
from mmfix.vision import Vision
from mmfix.watch import TowerWatch


class Session:
    """State shared by the hooks of one ``mitigate()`` block: one generation at a time."""

    def __init__(self, family: Family, methods: list[Method], backend: str | None, telemetry: bool) -> None:
        self.family = family
        self.methods = methods
        self.backend = backend
        self.telemetry = telemetry
        self.markers = _markers(family, methods)
        self.positions = rewriting(methods)
        self.image_mask: Tensor | None = None
        self.vision: Vision | None = None
        self.expander: Expander | None = None
        self.overlooking: Overlooking | None = None
        self.readouts: Readouts | None = None
        self.expanding = False  # whether the prompt at hand runs with branches
        self.mix: Mix | None = None
        self.mix_owner = 0
        self.mixed: Tensor | None = None  # Int64[2]: positions whose logits the mix changed, and positions seen
        self.search: Searching | None = None
        layers = range(family.num_layers)
        self.sink_layers = {n for n in layers for m in methods if m.wants_sinks(n, family.num_layers)}
        self.head_layers = {n for n in layers for m in methods if m.wants_heads(n, family.num_layers)}
        watches = any(m.tower_layers(len(family.tower_attentions)) for m in methods)
        self.watch = TowerWatch(family, methods) if watches else None
        self.received_layers = {n for n in layers for m in methods if m.wants_received(n, family.num_layers)}
        self.layers = [LayerState(n, self) for n in layers]
        self.scales_hidden = any(m.hidden_scale(n) is not None for n in layers for m in methods)
        self.talk: Conversation | None = None
        self.seen = 0  # keys seen so far
        self.active = False
        self.current = Pass()
        self._shared: weakref.ref[Any] | None = None
        self.text_only: TextOnly | None = None
        self.measuring: Measuring | None = None
        self.notes: list[str] = []
        self.calibrated: dict[str, Any] = {}
        self.prompts = 0
        self.passes = 0
        self.extra_passes = 0
        self.mass_sum: Tensor | None = None  # Float32[B, 8], over the layers of the current pass
        self.mass_layers = 0
        self._cache: weakref.ref[Any] | None = None
        self._prompt_ids: Tensor | None = None
        self._steps = passes.StepRows()
        self._asked = 0  # tokens that the caller gave this pass
        self.turn = Turn()
        self.steering = Steering.of(self)
        self.comparing = False  # whether a plain pass of the prompt runs, for methods that compare its states

    @property
    def spans(self) -> TokenSpans | None:
        return None if self.talk is None else self.talk.spans

    def watches(self, layer: int) -> bool:
        """Whether hooks on this decoder layer are needed."""
        replay = bool(self.head_layers) and layer <= max(self.head_layers)
        return replay or layer in self.sink_layers

    @property
    def whole(self) -> bool:
        """Whether some method looks at whole prompts, so that no part of one may run ahead of the rest."""
        asked = (self.sink_layers, self.head_layers, self.received_layers, self.watch, self.positions)
        steers = self.steering is not None and self.steering.whole
        return any(asked) or self.scales_hidden or steers or any(m.masks for m in self.methods)

    @property
    def rows_per_prompt(self) -> int:
        """Batch rows for each prompt at hand."""
        return 1 if self.branching is None else self.branching.rows.count

    @property
    def branching(self) -> Expander | None:
        """The expander, while the prompt at hand runs with branches."""
        return self.expander if self.expanding else None

    # -- once per forward pass ----------------------------------------------------------------------------------

    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Read the inputs of a forward pass of the model: tokens and masks of a prompt, row masks always.

        Args:
            frame: of the call of the model, which lasts as long as the pass.

        Returns the inputs expanded to one row per branch, or None when there are no branches.
        """
        self.turn.begin(frame)
        if self.family.model.training:
            raise MmfixError(
                "mitigate() changes attention at inference only and this model is in training mode; call model.eval()"
            )
        if args:  # every input by name
            kwargs = {**passes.bound(self.family.model, args), **kwargs}
        if kwargs.get("labels") is not None and self.mix is not None:
            raise MmfixError(
                "methods that combine logits have no loss; leave labels out and compute it from the logits"
            )
        given = Inputs.read((), kwargs)
        if self.readouts is not None:
            self.readouts.keep = kwargs.get("logits_to_keep", 0)
        if self.vision is not None and kwargs.get("pixel_values") is not None:
            self.vision.ask(given.ids, kwargs.get("attention_mask"))
        kind = self._kind(given)
        self._asked = given.length
        self.mass_sum, self.mass_layers = None, 0
        # Assisted decoding appends its first candidates to the prompt and asks for that many more logits.
        guessing = self.turn.generating and not self.turn.prefilling and kind == "prompt" and given.cache is not None
        guessed = max(0, given.kept - 1) if guessing else 0
        length = given.length - guessed
        if kind == "again" and self._prompt_ids is not None:
            length = self._prompt_ids.shape[1]
        if kind == "prompt":
            self._unshare()
            self._prompt_ids = None if given.ids is None else given.ids[:, :length]
            self.expanding = self.expander is not None and self._has_image(given.ids)
        elif kind == "piece" and self.expander is not None and not self.expanding and self._has_image(given.ids):
            raise MmfixError(
                "the prompt's first image came after its first piece, which ran without contrast branches; give the "
                "prompt at once (no prefill_chunk_size)"
            )
        expanded = None
        if kind == "prompt" and self.branching is not None and self.branching.measures:
            kwargs = measuring.ahead(self, given, kwargs, length)
        prefix = 0
        if kind == "prompt" and prefixes.worthwhile(self, given, kwargs):
            prefix, kwargs = prefixes.compute(self, given, kwargs, length)
        if self.branching is not None:
            expanded = self.branching.expand(given, kwargs, self.image_mask, length, kind != "step", prefix)
            length += self.branching.longer if kind != "step" else 0
            given = Inputs.read((), expanded)
            if kind == "prompt":
                given = dataclasses.replace(given, past=0)  # the cache may hold the shared start already
        prefill = kind in ("prompt", "piece")
        single = kind == "step" and given.length == 1
        self.current = Pass(prefill, given.past, given.past + given.length, length if prefill else 0, single=single)
        self.current.at_prompt = kind in ("prompt", "again")
        if prefill:
            self.read_prompt(given, expanded or kwargs, kind == "piece")
            if kind == "prompt":
                self._cache = None if given.cache is None else weakref.ref(given.cache)
        else:
            self._step(given)
        if prefix:
            assert expanded is not None
            expanded = prefixes.part(expanded, slice(prefix, None), slice(None))
            self.current.past, self.current.length = prefix, length - prefix
            given = Inputs.read((), expanded)
        self.seen = self.current.total
        self.read_rows(given.like.shape[0], given.length)
        if self.positions is not None:
            expanded = self._rewrite(given, expanded if expanded is not None else kwargs)
        self.active = True
        if expanded is None:
            return ((), kwargs) if args else None
        return (), expanded

    def _rewrite(self, given: Inputs, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs with the positions that a method gives them."""
        assert self.positions is not None
        assert self.spans is not None
        new = rewritten(self.positions, self.spans, self.current.past, given.length)
        return with_positions(kwargs, new, self.spans, self.current.total, self.family.name)

    @property
    def shared(self) -> Any:
        """The cache, while its prompt's start is stored once for all branches; else None."""
        return None if self._shared is None else self._shared()

    def _unshare(self) -> None:
        """Give the last prompt's cache ordinary layers again."""
        if self.shared is not None:
            prefixes.unshare(self.shared)
        self._shared = None

    def share(self, cache: Any, count: int) -> None:
        """Keep what a cache holds once for `count` rows each, until the next prompt."""
        prefixes.share(cache, count)
        self._shared = weakref.ref(cache)

    def close(self) -> None:
        """At the end of the block: nothing of it stays in caches that live on."""
        self._unshare()
        if self.expander is not None:
            self.expander.restore()
        if self.overlooking is not None:
            self.overlooking.close()
        self.talk = self._cache = self._prompt_ids = None
        if self.steering is not None:
            self.steering.close()
        for state in self.layers:
            state.close()

    def _has_image(self, ids: Tensor | None) -> bool:
        """Whether a prompt holds an image; without one there is nothing to contrast."""
        mask = self.image_mask
        if mask is not None and (ids is None or mask.shape[-1] == ids.shape[-1]):
            return bool(mask.any())
        return ids is not None and bool((ids == self.family.image_token_id).any())

    def _kind(self, given: Inputs) -> Kind:
        if not given.past:
            return "again" if given.cache is None and self._is_next_step(given) else "prompt"
        if self.talk is None or given.past > self.seen or self._cache is None or self._cache() is not given.cache:
            raise MmfixError(
                f"the cache holds {given.past} tokens of a prompt that is not the one mitigate() saw last, so its "
                "image tokens are unknown; enter mitigate() before the prompt is processed, and finish one prompt at "
                "a time"
            )
        if self.turn.prefilling or (given.picture is not None and not self.turn.generating):
            return "piece"
        guesses = given.kept == given.length and self.turn.generating > 0
        return "step" if given.length == 1 or guesses else "piece"

    def _is_next_step(self, given: Inputs) -> bool:
        """Whether ``generate()`` without a cache calls again with the same prompt and what it generated since."""
        prompt, ids = self._prompt_ids, given.ids
        if not self.turn.generating or self.turn.prefilling or self.talk is None or prompt is None or ids is None:
            return False
        longer = ids.shape[0] == prompt.shape[0] and ids.shape[1] > prompt.shape[1]
        return longer and torch.equal(ids[:, : prompt.shape[1]], prompt)

    def read_prompt(self, given: Inputs, kwargs: dict[str, Any], further: bool) -> None:
        """Spans of a new prompt, or of a further piece of one: the first `length` tokens of the pass."""
        length, past = self.current.length, given.past
        answered = self.talk is not None and bool(self.talk.steps)
        ids, embeds = (None if x is None else x[:, :length] for x in (given.ids, given.embeds))
        shape = given.like.shape[:2]
        if self.branching is not None:
            image = self.branching.image[:, past : past + length]
        else:
            image = image_tokens(ids, torch.Size((shape[0], length)), self.family.image_token_id, self.image_mask)
        width = past + length
        like = given.like.new_empty(shape[0], width)
        valid = token_spans.padding_mask(kwargs.get("attention_mask"), like)
        before = None
        if further:
            assert self.talk is not None
            pieces.check(self, past)
            before = self.talk.spans.has_image
            self.talk = self.talk.extended(ids, embeds, image, valid, past)
        else:
            self.talk = Conversation.begin(ids, embeds, image.bool(), valid)
            self.prompts += shape[0] // self.rows_per_prompt
        self._steps = passes.step_rows(self.talk.spans.has_image)
        capacity = passes.capacity(given.cache)
        segments = self.talk.segments(self.markers) if any(m.masks for m in self.methods) else None
        masks: dict[Any, Any] = {}
        for state in self.layers:
            state.prompt(self.talk.spans, segments, past, capacity, masks)
        if self.methods and not bool(self.talk.image.any()) and not any(state.reorder for state in self.layers):
            self.note("no image tokens in the prompt: methods that act on the image change nothing")
        if before is not None and bool((before != self.talk.spans.has_image).any()):
            (pieces.check_late_turn if answered else pieces.check_late_image)(self)
        if self.watch is not None:
            self.watch.due = "piece" if further else "prompt"
        if self.steering is not None:
            self.steering.prompt(self.talk.spans, given, further, answered, kwargs)
        self.text_only = None
        if self.head_layers and bool(self.talk.image.any()):
            self.text_only = TextOnly.of(self, kwargs.get("token_type_ids"))
            self.text_only.record()
            self.extra_passes += 1

    def _step(self, given: Inputs) -> None:
        """Decode tokens, for a batch that may have grown by beams."""
        assert self.talk is not None
        batch = given.like.shape[0]
        if self.talk.image.shape[0] != batch:
            self.talk = self.talk.widened(batch)
            self._steps = passes.step_rows(self.talk.spans.has_image)
        if given.past:
            self.talk.stepped(given.ids, given.past)
        if self.steering is not None:
            self.steering.step(batch)
        for state in self.layers:
            state.step(batch, self.current.total, again=not given.past)

    def read_rows(self, batch: int, q_len: int) -> None:
        """Which rows of this pass each kind of :class:`~mmfix_kernels.Rows` touches."""
        assert self.spans is not None
        if q_len == 1 and not self.current.prefill:
            self.current.rows, self.current.first = self._steps.rows, self._steps.first
        else:
            passes.read_rows(self.current, self.spans, batch, q_len)

    def check_inside(self) -> None:
        """Refuse a call of a part of the model: its prompt would be unknown."""
        if not self.active and not self.aside:
            raise MmfixError(
                f"attention ran outside a call of {self.family.name}, so the prompt is unknown; "
                "inside mitigate() call the model itself or its generate(), not one of its parts"
            )

    @property
    def aside(self) -> bool:
        """Whether a pass beside the prompt's own is running: the text-only branch, or one that compares or measures."""
        beside = self.comparing or self.measuring is not None
        return beside or (self.text_only is not None and bool(self.text_only.running))

    def finish(self, output: Any) -> Any:
        """After a forward pass of the model, also one that raised (without an output): mix the branches' logits.

        None leaves the output as it is.
        """
        if not self.turn.end():
            return None
        if output is None and self.active:  # it failed half-way: what the cache holds now is not known
            self.talk = self._cache = self._prompt_ids = None
        self.active = False
        self.passes += 1
        for state in self.layers:
            state.passed()
        parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if self.current.prefill and cache is not None:  # called without one, the model makes its own
            self._cache = weakref.ref(cache)
        if output is not None and self.branching is not None and self.branching.rewrite is not None:
            return self._rewritten(output)
        if self.mix is None or output is None or self.talk is None or not bool(self.talk.image.any()):
            return None
        rows = BranchRows(()) if self.branching is None else self.branching.rows
        has_image = self.talk.spans.has_image[:: rows.count]
        beyond = self.current.total - self.talk.spans.length
        beside = None if self.readouts is None else self.readouts.logits
        output, changed = rows.fold(output, self.mix, has_image, self._asked, beyond, beside)
        if self.readouts is not None:
            self.readouts.clear()
        self.mixed = changed if self.mixed is None else self.mixed + changed
        return output

    def _rewritten(self, output: Any) -> Any:
        """The output at the positions that were asked for, of prompts that a method rewrote."""
        assert self.talk is not None
        has_image = self.talk.spans.has_image
        seen = has_image.new_tensor(has_image.numel() * self._asked, dtype=torch.int64)
        counts = torch.stack([has_image.sum() * self._asked, seen])
        self.mixed = counts if self.mixed is None else self.mixed + counts
        return trimmed(output, self._asked)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, MmfixWarning, stacklevel=2)


def _markers(family: Family, methods: list[Method]) -> Markers | None:
    """The processor's markers, with the answer's one replaced by a method's own."""
    own = next((m.answer_marker for m in methods if m.answer_marker), None)
    if own is None:
        return family.markers
    return Markers(own, family.markers.user if family.markers is not None else ())
