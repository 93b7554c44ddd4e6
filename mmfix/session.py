"""One running mitigation: spans of the prompt at hand, edits per layer, counters and masses."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmfix import spans as token_spans
from mmfix.errors import MmfixError, MmfixWarning
from mmfix.families import Family
from mmfix.hooks import LayerState
from mmfix.method import Method, Site
from mmfix.spans import TokenSpans
from mmfix.textonly import TextOnly
from mmfix_kernels import AttentionCall, HeadScale, KeyGroups, Label, Rows, grouped_attention

_ROOM = 256  # labels kept ready beyond the prompt, so that a decode step writes nothing


@dataclass
class _Forward:
    """Facts of the forward pass at hand, shared by all layers."""

    active: bool = False
    prefill: bool = False
    total: int = 0  # keys after this pass
    rows: dict[Rows, Tensor | None] = field(default_factory=dict)
    first: dict[Rows, int] = field(default_factory=dict)


class Session:
    """State shared by the hooks of one ``mitigate()`` block. Not thread-safe: one generation at a time."""

    def __init__(self, family: Family, methods: list[Method], backend: str | None, telemetry: bool) -> None:
        self.family = family
        self.methods = methods
        self.backend = backend
        self.telemetry = telemetry
        self.image_mask: Tensor | None = None
        self.layers = [LayerState(n, self) for n in range(family.num_layers)]
        self.spans: TokenSpans | None = None
        self.length = 0  # keys seen so far
        self.forward = _Forward()
        self.text_only: TextOnly | None = None
        self._with_image: Tensor | None = None
        self.notes: list[str] = []
        self.prompts = 0
        self.passes = 0
        self.extra_passes = 0
        self.mass_sum: Tensor | None = None  # Float32[B, 8], over the layers of the current pass
        self.mass_layers = 0
        self._sink_layers = {
            n for n in range(family.num_layers) for m in methods if m.wants_sinks(n, family.num_layers)
        }
        self._head_layers = {
            n for n in range(family.num_layers) for m in methods if m.wants_heads(n, family.num_layers)
        }

    def watches(self, layer: int) -> bool:
        """Whether hooks on this decoder layer are needed."""
        replay = bool(self._head_layers) and layer <= max(self._head_layers)
        return replay or layer in self._sink_layers

    # -- once per forward pass ----------------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the inputs of a forward pass of the model: spans at prefill, row masks always."""
        if self.family.model.training:
            raise MmfixError(
                "mitigate() changes attention at inference only and this model is in training mode; call model.eval()"
            )
        ids, embeds = _token_inputs(args, kwargs)
        batch, q_len = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
        past = _past_length(kwargs.get("past_key_values"))
        self.forward = _Forward(active=True, prefill=past == 0, total=past + q_len)
        self.mass_sum, self.mass_layers = None, 0
        if past == 0:
            self._prompt(ids, embeds, kwargs.get("attention_mask"))
        elif self.spans is None or past > self.length:
            raise MmfixError(
                f"the cache holds {past} tokens of which mitigate() saw {self.length}, so their image tokens are "
                "unknown; enter mitigate() before the prompt is processed"
            )
        else:
            self._continue(ids, batch, past, q_len)
        self.length = self.forward.total
        self._rows(batch, past, q_len)

    def _prompt(self, ids: Tensor | None, embeds: Tensor | None, attention_mask: Any) -> None:
        like = ids if ids is not None else embeds
        assert like is not None
        shape = like.shape[:2]
        if self.image_mask is not None:
            image = self.image_mask.to(like.device)
            if image.shape != shape:
                raise MmfixError(
                    f"image_mask {tuple(image.shape)} does not fit the prompt {tuple(shape)}; "
                    "set it to Bool[batch, tokens] of this prompt, or to None"
                )
        elif ids is not None:
            image = ids == self.family.image_token_id
        else:
            raise MmfixError(
                "inputs_embeds came without input_ids, so image tokens cannot be found; "
                "set the mitigation's image_mask to Bool[batch, tokens] first"
            )
        self.spans = token_spans.build(image.bool(), _valid(attention_mask, like))
        self.prompts += shape[0]
        if self.methods and not bool(self.spans.image.any()):
            self._note("no image tokens in the prompt: methods that act on the image change nothing")
        self._note_images()
        labels = _padded(self.spans.labels, shape[1] + _ROOM)
        sites = [Site(n, self.family.num_layers, self.family.num_heads, self.spans) for n in range(len(self.layers))]
        for state, site in zip(self.layers, sites, strict=True):
            state.labels = labels
            state.edits, state.edit_owners = [], []
            for owner, one in enumerate(self.methods):
                for edit in one.edits(site):
                    state.edits.append(edit)
                    state.edit_owners.append(owner)
        self.text_only = None
        if self._head_layers and bool(self.spans.image.any()):
            scale = all(m.scales_text_only for m in self.methods)
            self.text_only = TextOnly(self.family, self.spans, ids, embeds, max(self._head_layers), scale)
            self.text_only.record()
            self.extra_passes += 1

    def _continue(self, ids: Tensor | None, batch: int, past: int, q_len: int) -> None:
        assert self.spans is not None
        for state in self.layers:
            assert state.labels is not None
            if state.labels.shape[0] != batch:
                state.labels = _rows_for(state.labels, batch)
            if state.labels.shape[1] < past + q_len:
                state.labels = _padded(state.labels, past + q_len + _ROOM)
        if self.spans.image.shape[0] != batch:
            self.spans = TokenSpans(
                image=_rows_for(self.spans.image, batch),
                valid=_rows_for(self.spans.valid, batch),
                labels=_rows_for(self.spans.labels, batch),
                starts={kind: _rows_for(start, batch) for kind, start in self.spans.starts.items()},
                last=_rows_for(self.spans.last, batch),
            )
            self._note_images()
        if q_len > 1 and ids is not None:  # a further turn may bring further images
            image = ids == self.family.image_token_id
            if bool(image.any()):
                for state in self.layers:
                    assert state.labels is not None
                    state.labels = state.labels.clone()
                    state.labels[:, past : past + q_len][image] = int(Label.IMAGE)

    def _note_images(self) -> None:
        """Keep the row mask of a decode step at hand: None when every prompt has an image."""
        assert self.spans is not None
        has_image = self.spans.has_image
        self._with_image = None if bool(has_image.all()) else has_image[:, None]

    def _rows(self, batch: int, past: int, q_len: int) -> None:
        """Which rows of this pass each kind of :class:`Rows` touches."""
        spans = self.spans
        assert spans is not None
        if q_len == 1 and not self.forward.prefill:
            # One new token is after the image, and the newest; only prompts without an image differ.
            self.forward.rows = {Rows.ALL: None, Rows.LAST: None, Rows.AFTER_IMAGE: self._with_image}
            self.forward.first = dict.fromkeys(Rows, 0)
            return
        positions = torch.arange(past, past + q_len, device=spans.image.device)
        valid = torch.ones(batch, q_len, dtype=torch.bool, device=positions.device)
        if self.forward.prefill:
            valid = spans.valid
        for kind, start in spans.starts.items():
            mask = (positions[None, :] >= start[:, None]) & valid
            anywhere = mask.any(0)
            self.forward.first[kind] = int(anywhere.int().argmax()) if bool(anywhere.any()) else q_len
            self.forward.rows[kind] = mask

    @property
    def aside(self) -> bool:
        """Whether the text-only branch is running."""
        return self.text_only is not None and bool(self.text_only.running)

    # -- once per layer -----------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, hidden: Tensor) -> None:
        """Before a decoder layer: sinks from its input, text-only head outputs; at prefill only."""
        if not self.forward.prefill or self.spans is None or self.aside:
            return
        state = self.layers[layer]
        site = Site(layer, self.family.num_layers, self.family.num_heads, self.spans)
        if layer in self._sink_layers:
            sinks = torch.zeros_like(self.spans.valid)
            for one in self.methods:
                if one.wants_sinks(layer, self.family.num_layers):
                    sinks |= one.sinks(site, hidden)
            labels = token_spans.relabel_sinks(self.spans.labels, sinks)
            state.labels = _padded(labels, labels.shape[1] + _ROOM)
        if self.text_only is not None and layer in self._head_layers:
            self.text_only.probe(layer)

    def leave_layer(self, layer: int) -> None:
        """After a decoder layer: let the text-only branch follow."""
        if self.forward.prefill and self.text_only is not None and not self.aside:
            scales = [e for e in self.layers[layer].edits if isinstance(e, HeadScale)]
            if self.text_only.advance(layer, scales):
                self.text_only = None

    def attend(self, state: LayerState, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """One attention call of the language model."""
        if self.aside:
            assert self.text_only is not None
            return self.text_only.attend(inputs, self.backend)
        if not self.forward.active:
            raise MmfixError(
                f"attention ran outside a call of {type(self.family.model).__name__}, so the prompt is unknown; "
                "inside mitigate() call the model itself or its generate(), not one of its parts"
            )
        state.calls += 1
        groups = self._groups(state, inputs["key"].shape[2]) if state.edits or self.telemetry else None
        call = AttentionCall(**inputs, groups=groups, edits=state.edits, masses="last" if self.telemetry else "none")
        attended = grouped_attention(call, self.backend)
        state.backend, state.reason = attended.backend, attended.reason
        output = attended.output
        if state.edits:
            state.count(attended.fired)
        if self.forward.prefill and state.layer in self._head_layers:
            output = self._scale_heads(state, output)
        if attended.masses is not None:
            mean = attended.masses[:, :, -1].mean(1)
            self.mass_sum = mean if self.mass_sum is None else self.mass_sum + mean
            self.mass_layers += 1
        return output.transpose(1, 2).contiguous(), None

    def _groups(self, state: LayerState, s_len: int) -> KeyGroups:
        """Labels and rows of one call with `s_len` keys."""
        labels = state.labels
        assert labels is not None
        offset = max(0, self.forward.total - s_len)  # sliding-window layers keep the tail of the keys
        if labels.shape[1] < offset + s_len:  # a static cache is longer than the prompt
            labels = state.labels = _padded(labels, offset + s_len + _ROOM)
        return KeyGroups(labels=labels[:, offset : offset + s_len], rows=self.forward.rows, first=self.forward.first)

    def _scale_heads(self, state: LayerState, output: Tensor) -> Tensor:
        """Ask the methods for head factors at this layer, freeze them for the generation, and apply them."""
        if self.text_only is None or self.spans is None:
            return output
        index = self.spans.last[:, None, None, None].expand(-1, output.shape[1], 1, output.shape[3])
        heads = output.gather(2, index)[:, :, 0]
        # Without an image both branches are the same prompt: make their difference zero, not rounding noise.
        text_only = torch.where(self.spans.has_image[:, None, None], self.text_only.heads(), heads)
        site = Site(state.layer, self.family.num_layers, self.family.num_heads, self.spans)
        for owner, one in enumerate(self.methods):
            if not one.wants_heads(state.layer, self.family.num_layers):
                continue
            edit = one.head_scale(site, heads, text_only)
            output = output * edit.scale.to(output.dtype)[:, :, None, None]
            state.edits.append(edit)
            state.edit_owners.append(owner)
            places = output.shape[0] * output.shape[1] * output.shape[2]
            counted = torch.stack([(edit.scale != 1).sum() * output.shape[2], edit.scale.new_tensor(places).long()])
            if state.fired is None:
                state.fired = torch.zeros(len(self.methods), 2, dtype=torch.int64, device=output.device)
            state.fired[owner] += counted
        return output

    def finish(self) -> None:
        """After a forward pass of the model."""
        self.forward.active = False
        self.passes += 1

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, MmfixWarning, stacklevel=2)


def _token_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    ids = kwargs.get("input_ids")
    if ids is None and args and isinstance(args[0], Tensor):
        ids = args[0]
    embeds = kwargs.get("inputs_embeds")
    if ids is None and embeds is None:
        raise MmfixError("the model was called with neither input_ids nor inputs_embeds; give one of them")
    return ids, embeds


def _valid(attention_mask: Any, like: Tensor) -> Tensor:
    """Bool[B, T] of the tokens that are not padding, from whatever mask the model was given."""
    batch, length = like.shape[:2]
    if isinstance(attention_mask, dict):  # one mask per kind of layer; the full one sees every token
        attention_mask = attention_mask.get("full_attention")
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=like.device)
    mask: Tensor = attention_mask
    if mask.ndim == 2:
        return mask[:, :length].to(like.device).bool()
    last = mask[:, 0, -1, :length].expand(batch, -1).to(like.device)  # what the last row may see
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _padded(labels: Tensor, width: int) -> Tensor:
    """Labels widened to `width`; what lies beyond the prompt will be generated."""
    extra = labels.new_full((labels.shape[0], width - labels.shape[1]), int(Label.GENERATED))
    return torch.cat([labels, extra], dim=1)


def _rows_for(tensor: Tensor, batch: int) -> Tensor:
    """Rows repeated for a batch that grew by a whole factor after the prompt (beams)."""
    if batch % tensor.shape[0]:
        raise MmfixError(
            f"the prompt had {tensor.shape[0]} rows and this step has {batch}; start a new generate() call"
        )
    return tensor.repeat_interleave(batch // tensor.shape[0], dim=0)
