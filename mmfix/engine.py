"""``mitigate()``: put methods into a model's forward pass for a while, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mmfix import report as reports
from mmfix.calibration import calibrated
from mmfix.errors import ConflictError, MethodError, UnsupportedModel, UsageError
from mmfix.expand import Expander
from mmfix.families import Family, describe
from mmfix.hooks import ATTRIBUTE, NAME, register_attention
from mmfix.method import Method
from mmfix.restore import Snapshot
from mmfix.session import Session
from mmfix.vision import TowerState, Vision
from mmfix_kernels import forced_backend

MethodLike = str | Method


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

    def report(self) -> reports.Report:
        """Backend per layer, how often each method fired, masses, passes; everything since entry."""
        return reports.build(self._session)

    def masses(self) -> dict[str, Tensor] | None:
        """Attention mass of the newest token by key group, Float32[B] each; None without ``telemetry=True``."""
        return reports.named_masses(self._session)


@contextmanager
def mitigate(
    model: Any, method: MethodLike | Sequence[MethodLike] | None, *, telemetry: bool = False, **params: Any
) -> Iterator[Mitigation]:
    """Run `method` inside the model's forward pass for the length of a ``with`` block.

    ``model.generate()`` and ``model(...)`` are called as ever. On exit, by any path, everything is put back and
    compared with what was there before.

    Args:
        model: a ``transformers`` vision-language model in evaluation mode.
        method: a name, a :class:`~mmfix.method.Method`, a list of them (applied in order), or None for none.
            By name, a model's calibrated parameters are used where it has any.
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
    family = describe(model)
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
    _branch(session, family, methods, backend)
    snapshot = Snapshot(model)
    try:
        with ExitStack() as stack:
            _install(family, session, snapshot, stack)
            yield Mitigation(session)
    finally:
        snapshot.verify()


def _prepared(family: Family, method: MethodLike | Sequence[MethodLike] | None, params: dict[str, Any]) -> list[Method]:
    given = [] if method is None else list(method) if isinstance(method, (list, tuple)) else [method]
    if params and not (len(given) == 1 and isinstance(given[0], str)):
        raise MethodError(f"parameters {', '.join(params)} were given without a single method name to apply them to")
    built = []
    for one in given:
        if isinstance(one, str):
            one = calibrated(family.model, one, **params)
        if not isinstance(one, Method):
            raise MethodError(f"{one!r} is not a method; give a name such as 'var' or an object such as VAR()")
        built.append(one.prepare(family))
    names = [m.info.name for m in built]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConflictError(f"method {twice[0]!r} is given twice, and each edits what the other did; give it once")
    return built


def _branch(session: Session, family: Family, methods: list[Method], backend: str | None) -> None:
    """Give the session its branches and mix; at most one method may have them."""
    mixing = [(n, m) for n, m in enumerate(methods) if m.mix() is not None]
    if len(mixing) > 1:
        names = " and ".join(repr(m.info.name) for _, m in mixing)
        raise ConflictError(f"methods {names} both combine logits; use one of them")
    for owner, one in mixing:
        branches, mix = tuple(one.branches(family)), one.mix()
        assert mix is not None
        if len(mix.weights) != 1 + len(branches):
            raise MethodError(f"{one.info.name}: {len(mix.weights)} mix weights for {1 + len(branches)} branches")
        vision = Vision(family, branches, backend)
        if vision.needed and not family.tower_attentions:
            raise UnsupportedModel(
                f"{type(family.model).__name__}: the vision tower's attention modules cannot be found or replaced, and "
                f"{one.info.name} changes them; use a method that leaves the vision tower alone"
            )
        session.vision, session.mix, session.mix_owner = vision, mix, owner
        if branches:
            session.expander = Expander(family, branches, vision)


def _install(family: Family, session: Session, snapshot: Snapshot, stack: ExitStack) -> None:
    """Change the model; every change is undone by `stack`, also when a later one fails."""
    register_attention()
    for config, before in snapshot.settings.values():
        stack.callback(setattr, config, "_attn_implementation_internal", before)
    family.decoder.set_attn_implementation(NAME)
    for module, state in zip(family.attentions, session.layers, strict=True):
        if getattr(module.config, "_attn_implementation", None) != NAME:
            raise UnsupportedModel(
                f"{type(family.model).__name__}: {type(module).__name__} of layer {state.layer} keeps its own "
                "attention, outside transformers' AttentionInterface; update transformers or use another model"
            )
        stack.callback(module.__dict__.pop, ATTRIBUTE, None)
        module.__dict__[ATTRIBUTE] = state

    def hook(handle: Any) -> None:
        snapshot.hook_ids.add(handle.id)
        stack.callback(handle.remove)

    if session.expander is not None:
        stack.callback(session.expander.restore)
    if session.vision is not None and session.vision.needed:
        _install_vision(family, session.vision, stack)
    hook(
        family.model.register_forward_pre_hook(
            lambda module, args, kwargs: session.begin(args, kwargs), with_kwargs=True
        )
    )
    hook(family.model.register_forward_hook(lambda module, args, output: session.finish(output), always_call=True))
    if family.model.base_model is not family.model:
        hook(family.model.base_model.register_forward_pre_hook(lambda module, args: session.check_inside()))
    for n, layer in enumerate(family.layers):
        if session.watches(n):
            hook(layer.register_forward_pre_hook(_entering(session, n), with_kwargs=True))
            hook(layer.register_forward_hook(_leaving(session, n)))


def _install_vision(family: Family, vision: Vision, stack: ExitStack) -> None:
    """Replace the tower's attention and catch pixels where they are encoded."""
    family.tower.set_attn_implementation(NAME)
    for number, module in enumerate(family.tower_attentions):
        if getattr(module.config, "_attn_implementation", None) != NAME:
            raise UnsupportedModel(
                f"{type(family.model).__name__}: {type(module).__name__} of the vision tower keeps its own attention"
            )
        stack.callback(module.__dict__.pop, ATTRIBUTE, None)
        module.__dict__[ATTRIBUTE] = TowerState(number, vision)
    base = family.model.base_model
    stack.callback(base.__dict__.pop, "get_image_features", None)
    base.__dict__["get_image_features"] = vision.wrapped(base.get_image_features)


def _entering(session: Session, layer: int) -> Any:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session.enter_layer(layer, args[0] if args else kwargs["hidden_states"])

    return enter


def _leaving(session: Session, layer: int) -> Any:
    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session.leave_layer(layer)

    return leave
