"""Everything a mitigation changes on a model, in the order in which it is undone backwards."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mmfix import handing, hidden, prepending
from mmfix.errors import MmfixError, UnsupportedModel
from mmfix.families import Family
from mmfix.hooks import NAME, register_attention
from mmfix.layers import LayerState
from mmfix.outer import Outer
from mmfix.restore import ATTRIBUTE, PrivateConfigs, Snapshot, override
from mmfix.session import Session
from mmfix.vision import TowerState, Vision


def install(family: Family, session: Session, snapshot: Snapshot, stack: ExitStack) -> None:
    """Change the model; every change is undone by `stack`, also when a later one fails."""
    register_attention()
    private = PrivateConfigs(family.whole)
    stack.callback(private.put_back)
    family.decoder.set_attn_implementation(NAME)
    for module, state in zip(family.attentions, session.layers, strict=True):
        if getattr(module.config, "_attn_implementation", None) != NAME:
            raise UnsupportedModel(
                f"{family.name}: {type(module).__name__} of layer {state.layer} keeps its own "
                "attention, outside transformers' AttentionInterface; update transformers or use another model"
            )
        if state.layer not in family.cross_layers:  # their keys are the picture's, not the prompt's
            stack.callback(module.__dict__.pop, ATTRIBUTE, None)
            module.__dict__[ATTRIBUTE] = state

    def hook(handle: Any) -> None:
        snapshot.hook_ids.add(handle.id)
        stack.callback(handle.remove)

    stack.callback(session.close)
    for handle in prepending.install(session, family.layers):
        hook(handle)
    for one in hidden.hooks(family, session):
        for handle in one.install():
            hook(handle)
    if session.vision is not None and session.vision.needed:
        _install_vision(family, session.vision, stack)
    if session.vision is not None and session.watch is not None and "tower" not in session.vision.parts:
        _install_looking(family, session.vision, "tower", stack)
    if session.expander is not None:
        handing.install(family, stack)
    if family.outer is not None:
        outer = Outer(family, session)
        if session.expander is not None:
            session.expander.outer = outer
        for handle in outer.hooks():
            hook(handle)
    _install_calls(family.model, session, stack)
    hook(
        family.model.register_forward_pre_hook(
            lambda module, args, kwargs: session.begin(args, kwargs, sys._getframe(1)), with_kwargs=True
        )
    )
    hook(family.model.register_forward_hook(lambda module, args, output: session.finish(output), always_call=True))
    if family.model.base_model is not family.model:
        hook(family.model.base_model.register_forward_pre_hook(lambda module, args: session.check_inside()))
    if session.readouts is not None:
        stack.callback(session.readouts.clear)
        for handle in session.readouts.hooks():
            hook(handle)
    for n, layer in enumerate(family.layers):
        if session.watches(n):
            hook(layer.register_forward_pre_hook(_entering(session.layers[n]), with_kwargs=True))
            hook(layer.register_forward_hook(_leaving(session.layers[n])))
    if session.steering is not None:
        for handle in session.steering.hooks():
            hook(handle)


def disturbed(family: Family, session: Session) -> list[str]:
    """What of the installation is no longer in place, at the end of the block."""
    found = []
    for module, state in zip(family.attentions, session.layers, strict=True):
        setting = getattr(module.config, "_attn_implementation", None)
        if setting != NAME:
            found.append(f"attention of layer {state.layer} was set to {setting!r}")
        if module.__dict__.get(ATTRIBUTE) is not state and state.layer not in family.cross_layers:
            found.append(f"the state of layer {state.layer} was replaced")
    return found


def _install_vision(family: Family, vision: Vision, stack: ExitStack) -> None:
    """Catch pixels where they are encoded and, where a branch edits the tower, replace its attention."""
    base = family.model.base_model
    if hasattr(base, "get_image_features"):
        override(base, "get_image_features", vision.wrapped(base.get_image_features), stack)
    if not vision.edits_tower:
        return
    for part in sorted(vision.parts):
        _install_looking(family, vision, part, stack)


def _install_looking(family: Family, vision: Vision, part: str, stack: ExitStack) -> None:
    """Replace the attention of one part that looks at the picture."""
    (family.tower if part == "tower" else family.resampler).set_attn_implementation(NAME)
    for number, module in enumerate(family.looking(part)):
        if getattr(module.config, "_attn_implementation", None) != NAME:
            raise UnsupportedModel(f"{family.name}: {type(module).__name__} of the {part} keeps its own attention")
        stack.callback(module.__dict__.pop, ATTRIBUTE, None)
        module.__dict__[ATTRIBUTE] = TowerState(number, vision, part)


def _install_calls(model: Any, session: Session, stack: ExitStack) -> None:
    """Calls of the model that pass its hooks by: compiled decoding, and continuous batching (refused)."""

    def replace(name: str, function: Callable[..., Any]) -> None:
        if hasattr(model, name):
            override(model, name, function, stack)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise MmfixError(
            "continuous batching (generate_batch) packs many prompts into one row of paged keys, where their images "
            "cannot be told apart; inside mitigate() call generate() with a padded batch"
        )

    compiled: dict[str, Callable[..., Any]] = {}

    def get_compiled_call(config: Any = None) -> Callable[..., Any]:
        """The forward pass compiled without its hooks, which read and fold tensors of changing meaning outside it."""
        options = (config if config is not None else model._default_compile_config()).to_dict()
        key = repr(sorted(options.items(), key=str))
        if key not in compiled:
            compiled[key] = torch.compile(model.forward, **options)
        forward = compiled[key]

        def call(*args: Any, **kwargs: Any) -> Any:
            output = None
            try:
                args, kwargs = session.begin(args, kwargs, sys._getframe()) or (args, kwargs)
                output = forward(*args, **kwargs)
            finally:
                mixed = session.finish(output)
            return output if mixed is None else mixed

        return call

    original_generate = model.generate

    @functools.wraps(original_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if session.search is not None and not session.turn.generating:
            kwargs = session.search.arguments(args, kwargs)
        if session.vision is not None:
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            session.vision.ask(ids, kwargs.get("attention_mask"))
        with session.turn.generation():
            return original_generate(*args, **kwargs)

    replace("generate", generate)
    prefill = getattr(model, "_prefill", None)
    if prefill is not None:

        @functools.wraps(prefill)
        def prefilling(*args: Any, **kwargs: Any) -> Any:
            session.turn.prefilling = True
            try:
                return prefill(*args, **kwargs)
            finally:
                session.turn.prefilling = False

        replace("_prefill", prefilling)
    replace("get_compiled_call", get_compiled_call)
    replace("generate_batch", refuse)
    replace("init_continuous_batching", refuse)


def _entering(state: LayerState) -> Any:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.enter(args[0] if args else kwargs["hidden_states"])

    return enter


def _leaving(state: LayerState) -> Any:
    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state.leave()

    return leave
