"""``mitigate()``: put methods into a model's forward pass for a while, and take them out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from mmfix import report as reports
from mmfix.calibration import calibrated, in_use
from mmfix.errors import ConflictError, MethodError, MmfixError, UnsupportedModel, UsageError
from mmfix.expand import Expander
from mmfix.families import Family, describe, why_not
from mmfix.focusing import Focusing
from mmfix.install import disturbed, install
from mmfix.method import Method
from mmfix.overlooking import Overlooking
from mmfix.readouts import Readouts
from mmfix.restore import ATTRIBUTE, Snapshot
from mmfix.search import OverTrust
from mmfix.searching import OverTrusting
from mmfix.segments import Markers, chat_markers
from mmfix.selection import Outliers
from mmfix.session import Session
from mmfix.vision import Vision
from mmfix_kernels import forced_backend

MethodLike = str | Method

# What models and processors call the tokens around a picture, before "_token_id" or "_token_index".
_AROUND_IMAGE = ("vision_start", "vision_end", "image_start", "image_end", "start_image", "end_image", "boi", "eoi",
                 "fake_image")  # fmt: skip


class Mitigation:
    """A running mitigation; what ``with mmfix.mitigate(…) as fix`` gives.

    Attributes:
        methods: the methods in force, every default resolved for this model.
        image_mask: Bool[B, T] of image tokens, to be set before calls with ``inputs_embeds`` and no ``input_ids``;
            None reads the model's image-token id.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(self._session.methods)

    @property
    def image_mask(self) -> Tensor | None:
        return self._session.image_mask

    @image_mask.setter
    def image_mask(self, mask: Tensor | None) -> None:
        if mask is not None and (mask.ndim != 2 or mask.is_floating_point()):
            raise UsageError(f"image_mask {tuple(mask.shape)} of {mask.dtype}: give Bool[batch, tokens], or None")
        self._session.image_mask = None if mask is None else mask.bool()

    @property
    def rows_per_prompt(self) -> int:
        """Batch rows that the model computes for every prompt: 1, and one for each contrast branch."""
        return self._session.rows_per_prompt

    @property
    def image_tokens(self) -> Tensor | None:
        """Bool[B, T]: image tokens of the prompts at hand; None before the first."""
        spans = self._session.spans
        return None if spans is None else spans.image[:: self._session.rows_per_prompt]

    def report(self) -> reports.Report:
        """Backend per layer, how often each method fired, masses, passes; everything since entry."""
        return reports.build(self._session)

    def masses(self) -> dict[str, Tensor] | None:
        """Attention mass of the newest token by key group, Float32[B] each; None without ``telemetry=True``."""
        return reports.named_masses(self._session)


@contextmanager
def mitigate(
    model: Any,
    method: MethodLike | Sequence[MethodLike] | None,
    *,
    processor: Any = None,
    telemetry: bool = False,
    **params: Any,
) -> Iterator[Mitigation]:
    """Run `method` inside the model's forward pass for the length of a ``with`` block.

    ``model.generate()`` and ``model(...)`` are called as ever. On exit, by any path, everything is put back and
    compared with what was there before.

    Args:
        model: a ``transformers`` vision-language model in evaluation mode.
        method: a name, a :class:`~mmfix.method.Method`, a list of them (applied in order), or None for none.
            By name, a model's calibrated parameters are used where it has any.
        processor: the model's processor (or tokenizer). Methods that tell questions from answers read its chat
            template, and methods with a text of their own have it tokenised; the others do without.
        telemetry: also measure the newest token's attention mass by key group, in every layer.
        **params: parameters of a single method given by name.

    Yields:
        A :class:`Mitigation`.

    Raises:
        UnsupportedModel: a fact about the model is missing; nothing was changed.
        MethodError: unknown method or parameter, or a value out of range.
        ConflictError: the model is already being mitigated, or the methods cannot act together.
        RestoreError: on exit, something could not be put back.

    Example:
        >>> with mmfix.mitigate(model, "var", move=0.4) as fix:
        ...     ids = model.generate(**inputs, max_new_tokens=64)
        >>> fix.report().fired["var"].share
    """
    family = described(model, processor)
    if any(ATTRIBUTE in module.__dict__ for module in family.attentions):
        raise ConflictError(
            "this model is already inside a mitigate() block; leave it first, or pass a list of methods"
        )
    methods = _prepared(family, method, params)
    try:
        backend = forced_backend()
    except ValueError as error:
        raise UsageError(str(error)) from error
    session = Session(family, methods, backend, telemetry)
    session.calibrated = {m.info.name: found for m in methods if (found := in_use(family.whole, m)) is not None}
    for name, found in session.calibrated.items():
        if "model_revision" in found:
            session.note(
                f"{name}: calibrated for revision {found['revision']} of this model, which is now "
                f"{found['model_revision']}; calibrate again"
            )
    _branch(session, family, methods, backend)
    if session.watch is not None:
        session.vision = session.vision or Vision(family, (), backend)
        session.vision.watch = session.watch
    snapshot = Snapshot(model)
    changed: list[str] = []
    try:
        with ExitStack() as stack:
            install(family, session, snapshot, stack)
            stack.callback(lambda: changed.extend(disturbed(family, session)))
            yield Mitigation(session)
    finally:
        snapshot.verify(changed)


def described(model: Any, processor: Any = None) -> Family:
    """The model as methods see it, with what its processor tells of prompts.

    Raises:
        UnsupportedModel: a fact about the model is missing.
    """
    family = dataclasses.replace(describe(model), around_image=_around_image(model.config))
    if processor is None:
        return family
    tokenizer = getattr(processor, "tokenizer", processor)
    around = {*family.around_image, *_around_image(processor), *_around_image(tokenizer)} - {family.image_token_id}
    ends = getattr(tokenizer, "all_special_ids", None) or ()
    return dataclasses.replace(
        family,
        markers=_markers_of(processor),
        encode=_encoder_of(processor),
        decode=_decoder_of(processor),
        around_image=tuple(sorted(around)),
        special=tuple(sorted(set(ends) - {getattr(tokenizer, "bos_token_id", None)})),
    )


def _around_image(known: Any) -> tuple[int, ...]:
    """Ids of the tokens around a picture that a configuration, processor or tokenizer names."""
    names = [f"{what}_{kind}" for what in _AROUND_IMAGE for kind in ("token_id", "token_index")]
    found = {getattr(known, name, None) for name in names}
    return tuple(sorted(one for one in found if isinstance(one, int) and not isinstance(one, bool) and one >= 0))


def _markers_of(processor: Any) -> Markers | None:
    """Markers of the chat template; None where it has none, which a method that needs them will say."""
    try:
        return chat_markers(processor)
    except MmfixError:
        return None


def _encoder_of(processor: Any) -> Callable[[str], Sequence[int]] | None:
    """Text → token ids; None for a processor that only tells markers."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer):
        return None
    return lambda text: [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _decoder_of(processor: Any) -> Callable[[Sequence[int]], str] | None:
    """Token ids → text without special tokens; None for a processor that only tells markers."""
    decode = getattr(getattr(processor, "tokenizer", processor), "decode", None)
    return None if decode is None else lambda ids: str(decode(list(ids), skip_special_tokens=True))


def _prepared(family: Family, method: MethodLike | Sequence[MethodLike] | None, params: dict[str, Any]) -> list[Method]:
    given = [] if method is None else list(method) if isinstance(method, (list, tuple)) else [method]
    if params and not (len(given) == 1 and isinstance(given[0], str)):
        raise MethodError(f"parameters {', '.join(params)} were given without a single method name to apply them to")
    built = []
    for one in given:
        if isinstance(one, str):
            one = calibrated(family.whole, one, **params)
        if not isinstance(one, Method):
            raise MethodError(f"{one!r} is not a method; give a name such as 'var' or an object such as VAR()")
        reason = why_not(family, one)
        if reason:
            raise UnsupportedModel(f"{family.name}: {one.info.name} does not apply: {reason}; use another method")
        built.append(one.prepare(family))
    names = [m.info.name for m in built]
    alone = [m.info.name for m in built if m.reorders]
    if alone and len(built) > 1:
        others = " and ".join(repr(name) for name in names if name != alone[0])
        raise ConflictError(
            f"method {alone[0]!r} computes attention by itself, so that {others} would not act; use it alone"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConflictError(f"method {twice[0]!r} is given twice, and each edits what the other did; give it once")
    return built


def _branch(session: Session, family: Family, methods: list[Method], backend: str | None) -> None:
    """Give the session its branches and mix, or its search; at most one method may have them."""
    mixing = [(n, m) for n, m in enumerate(methods) if m.mix() is not None]
    for _, one in mixing:  # a branch that loses some of the picture's tokens is no picture to whoever counts them
        counting = [m for m in methods if m is not one and (m.tells_pictures_apart or m.counts_patches(family))]
        if counting and any(isinstance(branch.select, Outliers) for branch in one.branches(family)):
            names = " and ".join(repr(m.info.name) for m in (one, *counting))
            raise ConflictError(f"methods {names}: a branch of the first lacks patches that the other counts; use one")
    rewriting = [(n, m) for n, m in enumerate(methods) if m.rewrites]
    searching = [(n, m) for n, m in enumerate(methods) if m.search() is not None]
    if len(mixing) + len(rewriting) > 1 and rewriting:
        names = " and ".join(repr(m.info.name) for _, m in rewriting + mixing)
        raise ConflictError(f"methods {names}: the logits of a rewritten prompt are not combined; use one of them")
    if len(searching) > 1 or (searching and (mixing or rewriting)):
        names = " and ".join(repr(m.info.name) for _, m in searching + mixing + rewriting)
        raise ConflictError(f"methods {names} both decide how the next token is chosen; use one of them")
    for owner, one in rewriting:
        rewrite = one.rewrite()
        if rewrite is not None:
            session.mix_owner = owner
            session.expander = Expander(family, (), Vision(family, (), backend), rewrite)
    for owner, one in searching:
        rules = one.search()
        assert rules is not None
        if isinstance(rules, OverTrust):
            session.search = OverTrusting(session, rules, owner)
        else:
            session.search = Focusing(session, rules, owner)
    if len(mixing) > 1:
        names = " and ".join(repr(m.info.name) for _, m in mixing)
        raise ConflictError(f"methods {names} both combine logits; use one of them")
    for owner, one in mixing:
        branches, mix, readouts = tuple(one.branches(family)), one.mix(), tuple(one.readouts(family))
        assert mix is not None
        if branches and readouts:
            raise MethodError(f"{one.info.name}: branches and readouts do not go together; give one of them")
        if len(mix.weights) != 1 + len(branches) + len(readouts):
            raise MethodError(
                f"{one.info.name}: {len(mix.weights)} mix weights for {1 + len(branches) + len(readouts)} branches"
            )
        blending = [m.info.name for m in methods if m.blend() is not None]
        if readouts and blending:
            raise ConflictError(
                f"{one.info.name!r} reads layers out beside the model's own logits, which {blending[0]!r} mixes with "
                "layers too; use one of them"
            )
        if readouts:
            session.readouts = Readouts(family, readouts, session)
        vision = Vision(family, branches, backend)
        if vision.edits_tower and not all(family.looking(p) for p in vision.parts):
            raise UnsupportedModel(
                f"{family.name}: the vision tower's attention modules cannot be found or replaced, and "
                f"{one.info.name} changes them; use a method that leaves the vision tower alone"
            )
        vision.inside = lambda: session.turn.generating > 0
        session.vision, session.mix, session.mix_owner = vision, mix, owner
        if branches:
            session.expander = Expander(family, branches, vision)
            overlooking = Overlooking(session.expander.rows)
            session.overlooking = overlooking if overlooking.selects else None
