"""One attention layer of the language model during a mitigation: its labels, edits, masks and counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix import received
from mmfix import reorder as reordered
from mmfix import segments as token_segments
from mmfix import spans as token_spans
from mmfix.errors import ConflictError, MmfixError, UnsupportedModel
from mmfix.inputs import rows_for
from mmfix.method import Site
from mmfix.reorder import Reorder, Rotary
from mmfix.segments import MaskEdit, Opened, Segments
from mmfix.spans import TokenSpans
from mmfix_kernels import (
    Attended,
    AttentionCall,
    Edit,
    Group,
    HeadMean,
    HeadScale,
    KeyGain,
    KeyGroups,
    KeyMove,
    Label,
    grouped_attention,
)
from mmfix_kernels.edits import membership

if TYPE_CHECKING:
    from mmfix.session import Session

_ROOM = 256  # labels kept ready beyond the prompt, so that a decode step writes nothing


class LayerState:
    """What one attention module needs during a mitigation; it is an attribute of that module.

    Args:
        layer: 0-based layer number.
        session: the mitigation's session, shared by all layers.
    """

    def __init__(self, layer: int, session: Session) -> None:
        self.layer = layer
        self.session = session
        self.labels: Tensor | None = None  # Int8[B, capacity]; this layer's own once sinks were found
        self.sinks: Tensor | None = None  # Bool[B, T]
        self.edits: list[Edit] = []
        self.owners: list[int | None] = []  # position of the method that gave each edit
        self.frozen: list[tuple[Edit, int]] = []  # what methods made of the prompt's attention; stays for its turns
        self.opened: Opened | None = None
        self.mask_owners: list[int] = []
        self.masks_apart = False  # whether masks change for some batch rows only
        self.reorder: Reorder | None = None
        self.fired: Tensor | None = None  # Int64[methods, 2]
        self.kept: dict[tuple[Group, ...], Tensor] = {}  # memberships of `kept_for`, the labels
        self.kept_for: Tensor | None = None
        self.calls = 0
        self.called = False
        self.repeating = False  # the attention runs once more for rows that are to stay plain
        self.backend = ""
        self.reason = ""

    # -- once per pass ------------------------------------------------------------------------------------------

    def prompt(
        self, spans: TokenSpans, segments: Segments | None, past: int, capacity: int, masks: dict[Any, Opened | None]
    ) -> None:
        """Ask the methods for the edits and masks of a prompt, or of one piece longer.

        Args:
            past: tokens of it that earlier passes processed.
            capacity: keys of a cache of fixed size, or 0.
            masks: what mask edits become, shared by the layers.
        """
        session = self.session
        width = capacity if capacity >= spans.length else spans.length + _ROOM
        if past and self.sinks is not None:
            self._relabel(spans, rows_for(self.sinks, spans.image.shape[0]), width)
        else:
            self.labels, self.sinks = padded(spans.labels, width), None
        site = self.site(spans, segments)
        self.edits, self.owners, self.mask_owners = [], [], []
        wanted: list[MaskEdit] = []
        for owner, one in enumerate(session.methods):
            for edit in one.edits(site):
                self.edits.append(edit)
                self.owners.append(owner)
            found = tuple(one.mask(site)) if one.masks else ()
            if found and wanted and found[0].share != wanted[0].share:
                names = " and ".join(repr(session.methods[n].info.name) for n in (*self.mask_owners, owner))
                raise ConflictError(
                    f"methods {names} change the mask of layer {self.layer} by different shares ({wanted[0].share:g} "
                    f"and {found[0].share:g}), and a layer has one; use one of them, or give them other layers"
                )
            if found:
                wanted += found
                self.mask_owners.append(owner)
        if session.branching is not None:
            for branch_edit in session.branching.edits(self.layer):
                self.edits.append(branch_edit)
                self.owners.append(None)  # what a contrast does is counted where the logits are mixed
        self.reorder = next((m.reorder(site) for m in session.methods if m.reorders), None)
        self.frozen = self.frozen if past else []
        for edit, owner in self.frozen:
            self.edits.append(edit)
            self.owners.append(owner)
        self.opened = None
        self.masks_apart = any(edit.batch is not None for edit in wanted)
        if wanted:
            assert segments is not None
            key = tuple(wanted)
            if key not in masks:
                masks[key] = token_segments.opened(segments, key, past, session.family.pictures_whole)
            self.opened = masks[key]
        self.reserve()

    def step(self, batch: int, total: int, again: bool) -> None:
        """Labels for `batch` rows of `total` keys; what lies beyond the prompt is generated.

        Args:
            again: the pass computes the prompt too, as without a cache; its masks then stay.
        """
        assert self.labels is not None
        if not again:
            self.opened = None
        if self.labels.shape[0] != batch:
            self.labels = rows_for(self.labels, batch)
            self.sinks = None if self.sinks is None else rows_for(self.sinks, batch)
        if self.labels.shape[1] < total:
            self.labels = padded(self.labels, total + _ROOM)

    def passed(self) -> None:
        """After a pass: count the call."""
        self.calls += self.called
        self.called = False

    def close(self) -> None:
        """At the end of the block: let go of what only a pass needs."""
        self.opened = self.kept_for = None
        self.kept = {}

    def __deepcopy__(self, memo: Any) -> Any:
        raise MmfixError(
            "a model cannot be copied inside mitigate(), whose state is on its layers; leave the block first"
        )

    def __reduce__(self) -> Any:
        raise MmfixError(
            "a model cannot be pickled inside mitigate(), whose state is on its layers; leave the block first"
        )

    def site(self, spans: TokenSpans, segments: Segments | None = None) -> Site:
        family = self.session.family
        return Site(self.layer, family.num_layers, family.num_heads, spans, segments)

    # -- once per layer and pass --------------------------------------------------------------------------------

    def enter(self, hidden: Tensor) -> None:
        """Before the decoder layer, at prefill: sinks from its input [B, L, hidden], text-only head outputs."""
        session = self.session
        if not session.active or not session.current.prefill or session.spans is None or session.aside:
            return
        spans, current = session.spans, session.current
        if self.layer in session.sink_layers:
            site = self.site(spans)
            sinks = torch.zeros(hidden.shape[0], current.length, dtype=torch.bool, device=hidden.device)
            for one in session.methods:
                if one.wants_sinks(self.layer, session.family.num_layers):
                    sinks |= one.sinks(site, hidden[:, : current.length])
            missing = spans.length - current.length
            if missing:
                older = self.sinks if self.sinks is not None else sinks.new_zeros(sinks.shape[0], 0)
                older = torch.nn.functional.pad(older[:, :missing], (0, missing - older[:, :missing].shape[1]))
                sinks = torch.cat([older, sinks], dim=1)
            assert self.labels is not None
            self._relabel(spans, sinks, self.labels.shape[1])
        if session.text_only is not None and self.layer in session.head_layers:
            session.text_only.probe(self.layer)

    def leave(self) -> None:
        """After the decoder layer: let the text-only branch follow."""
        session = self.session
        if session.active and session.current.prefill and session.text_only is not None and not session.aside:
            scales = [e for e in self.edits if isinstance(e, HeadScale)]
            if session.text_only.advance(self.layer, scales):
                session.text_only = None

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values that the rows of a prompt share, [B, H_kv, P, D]; None when each has its own."""
        shared = self.session.shared
        if shared is None or self.session.aside:
            return None
        layer = shared.layers[self.layer]
        return layer.prefix_keys, layer.prefix_values

    def attend(self, inputs: dict[str, Any], window: int | None) -> tuple[Tensor, Tensor | None]:
        """One attention call of the language model."""
        session = self.session
        if session.comparing:
            return grouped_attention(AttentionCall(**inputs), session.backend).output.transpose(1, 2).contiguous(), None
        if session.measuring is not None:
            return session.measuring.attend(inputs)
        if session.readouts is not None and session.readouts.alone:
            batch, heads, length, _ = inputs["query"].shape
            return inputs["value"].new_zeros(batch, length, heads, inputs["value"].shape[-1]), None
        if session.aside:
            assert session.text_only is not None
            return session.text_only.attend(inputs, session.backend)
        session.check_inside()
        self.called = True
        if self.reorder is not None:
            return self._attend_reordered(self.reorder, inputs, window)
        if session.overlooking is not None and session.branching is not None:
            assert session.spans is not None
            labelled = self._groups(AttentionCall(**inputs).keys)
            inputs = session.overlooking.masked(self.layer, inputs, labelled, session.current, session.spans.last)
        masses = "last" if session.telemetry and not self.repeating else "none"
        bare = AttentionCall(**inputs)
        asked = (
            not self.repeating
            and session.current.prefill
            and not session.current.past
            and self.layer in session.received_layers
        )
        if session.watch is not None and session.current.prefill and not self.repeating:
            session.watch.ask(self)
        if session.readouts is not None:
            session.readouts.read(self.layer, bare, self._groups)
        groups = self._groups(bare.keys) if self.edits or session.telemetry or asked else None
        if asked:
            received.ask(self, dataclasses.replace(bare, groups=groups))
        edits = self.edits if window is None else self._in_window(bare.keys)
        plain = dataclasses.replace(bare, groups=groups, edits=edits, masses=masses)  # type: ignore[arg-type]
        newest = None if session.search is None else session.search.watch
        if newest is not None and self.layer == newest.layer:
            newest.see(plain)
        if self.opened is None:
            attended = grouped_attention(plain, session.backend)
        else:
            attended = self._attend_opened(self.opened, plain, inputs, window)
        self.backend, self.reason = attended.backend, attended.reason
        output = attended.output
        if self.edits and not self.repeating:
            self._count(attended.fired)
        if session.current.prefill and not self.repeating and self.layer in session.head_layers:
            output = self._scale_heads(output)
        if attended.masses is not None:
            mean = attended.masses[:, :, -1].mean(1)
            if session.branching is not None:
                mean = mean[:: session.branching.rows.count]  # of the factual rows
            session.mass_sum = mean if session.mass_sum is None else session.mass_sum + mean
            session.mass_layers += 1
        return output.transpose(1, 2).contiguous(), None

    def _attend_reordered(self, plan: Reorder, inputs: dict[str, Any], window: int | None) -> tuple[Tensor, None]:
        """Attention over segments whose order is chosen here; nothing else edits such a layer."""
        session = self.session
        if window is not None:
            names = " and ".join(m.info.name for m in session.methods)
            raise UnsupportedModel(
                f"{session.family.name}: layer {self.layer} sees a sliding window of {window} keys, and {names} lets "
                "segments see each other whole; use another method or model"
            )
        rotary = Rotary(session.family, session.family.attentions[self.layer])
        output, fired = reordered.attend(inputs, plan, rotary, session.current.past, session.current.total)
        self._counters(output.device)[0] += fired
        self.backend, self.reason = "reference", "positions are chosen per head and query"
        return output.transpose(1, 2).contiguous(), None

    def _attend_opened(
        self, opened: Opened, plain: AttentionCall, inputs: dict[str, Any], window: int | None
    ) -> Attended:
        """Attention with pairs opened or closed; a share below 1 blends outputs with those of the plain mask."""
        mask = opened.apply(plain, window, max(0, self.session.current.total - plain.keys))
        changed = {**inputs, "mask": mask, "is_causal": False}
        call = AttentionCall(**changed, groups=plain.groups, edits=plain.edits, masses=plain.masses)
        attended = grouped_attention(call, self.session.backend)
        touched = [pairs.any(-1) for pairs in (opened.open, opened.close) if pairs is not None]
        rows = torch.stack(touched).any(0).sum()  # a row with pairs of both kinds is one row
        heads, places = call.query.shape[1], call.query.shape[0] * call.query.shape[1] * call.query.shape[2]
        for owner in () if self.repeating else self.mask_owners:
            self._counters(mask.device)[owner] += torch.stack([rows * heads, rows.new_tensor(places)])
        if opened.share == 1.0:
            return attended
        base = grouped_attention(plain, self.session.backend)
        output = torch.lerp(base.output, attended.output, opened.share)
        both = attended.masses
        if both is not None and base.masses is not None:
            both = torch.lerp(base.masses, both, opened.share)
        return Attended(output, both, attended.fired, attended.backend, attended.reason)

    def _in_window(self, s_len: int) -> list[Edit]:
        """The edits for a call that keeps the last `s_len` keys."""
        if not any(isinstance(edit, (KeyGain, KeyMove)) for edit in self.edits):
            return self.edits
        offset = max(0, self.session.current.total - s_len)
        return [e.behind(offset) if isinstance(e, (KeyGain, KeyMove)) else e for e in self.edits]

    def _groups(self, s_len: int) -> KeyGroups:
        """Labels and rows of one call with `s_len` keys."""
        labels = self.labels
        assert labels is not None
        current = self.session.current
        if labels.shape[1] == s_len and current.single:  # a fixed cache: no number that changes every step is read
            return KeyGroups(
                labels=labels, rows=current.rows, first=current.first, offset=None, columns=self._columns(0, s_len)
            )
        offset = max(0, current.total - s_len)  # sliding-window layers keep the tail of the keys
        if labels.shape[1] < offset + s_len:
            labels = self.labels = padded(labels, offset + s_len + _ROOM)
        dropped = (labels[:, :offset] != int(Label.PADDING)).sum(-1) if offset else None
        return KeyGroups(
            labels=labels[:, offset : offset + s_len],
            rows=current.rows,
            first=current.first,
            offset=current.past - offset,
            columns=self._columns(offset, s_len) if current.single else None,
            before=dropped,
        )

    def _columns(self, offset: int, s_len: int) -> Callable[[tuple[Group, ...]], Tensor] | None:
        """Memberships of keys offset:offset+s_len, kept while the labels stay; None in a compiled graph."""
        if torch.compiler.is_compiling():
            return None

        def columns(wanted: tuple[Group, ...]) -> Tensor:
            labels = self.labels
            assert labels is not None
            if wanted not in self.kept or self.kept_for is not labels:
                if self.kept_for is not labels:
                    self.kept, self.kept_for = {}, labels
                self.kept[wanted] = membership(labels, wanted)
            return self.kept[wanted][:, offset : offset + s_len]

        return columns

    def _scale_heads(self, output: Tensor) -> Tensor:
        """Ask the methods for head factors at this layer, freeze them for the generation, and apply them."""
        session = self.session
        if session.text_only is None or session.spans is None:
            return output
        spans = session.spans
        last = spans.last - session.current.past
        index = last[:, None, None, None].expand(-1, output.shape[1], 1, output.shape[3])
        heads = output.gather(2, index)[:, :, 0]
        # Without an image both branches are the same prompt: make their difference zero, not rounding noise.
        text_only = torch.where(spans.has_image[:, None, None], session.text_only.heads(), heads)
        for owner, one in enumerate(session.methods):
            if not one.wants_heads(self.layer, session.family.num_layers):
                continue
            edit = one.head_scale(self.site(spans), heads, text_only)
            output = output * edit.scale.to(output.dtype)[:, :, None, None]
            self.edits.append(edit)
            self.owners.append(owner)
            places = output.shape[0] * output.shape[1] * output.shape[2]
            counted = torch.stack([(edit.scale != 1).sum() * output.shape[2], edit.scale.new_tensor(places).long()])
            self._counters(output.device)[owner] += counted
        return output

    # -- book-keeping -------------------------------------------------------------------------------------------

    def _relabel(self, spans: TokenSpans, sinks: Tensor, width: int) -> None:
        sinks = torch.nn.functional.pad(sinks, (0, spans.length - sinks.shape[1]))
        self.sinks = sinks
        self.labels = padded(token_spans.relabel_sinks(spans.labels, sinks), width)

    def reserve(self) -> None:
        """Counters ready before a graph is compiled."""
        if (self.edits or self.session.scales_hidden) and self.labels is not None:
            self._counters(self.labels.device)

    def _counters(self, device: torch.device) -> Tensor:
        if self.fired is None:
            with torch.inference_mode(False):  # the counters outlive the caller's mode
                self.fired = torch.zeros(len(self.session.methods), 2, dtype=torch.int64, device=device)
        return self.fired

    def count(self, owner: int, fired: Tensor, device: torch.device) -> None:
        """Add Int64[2], places that a method changed and looked at."""
        self._counters(device)[owner] += fired

    def _count(self, fired: Tensor) -> None:
        """Add an attention call's fired counts to the methods that own its edits."""
        counters = self._counters(fired.device)
        for n, owner in enumerate(self.owners):
            if owner is not None:
                counters[owner] += fired[n]


def tells_rows_apart(edit: Edit) -> bool:
    """Whether an edit of a method acts on some batch rows, so that branches without the image may lack it."""
    if isinstance(edit, HeadScale):
        return edit.scale.ndim == 2
    return isinstance(edit, HeadMean) or edit.batch is not None


def padded(labels: Tensor, width: int) -> Tensor:
    """Labels widened to `width`; what lies beyond the prompt will be generated."""
    extra = labels.new_full((labels.shape[0], width - labels.shape[1]), int(Label.GENERATED))
    return torch.cat([labels, extra], dim=1)
