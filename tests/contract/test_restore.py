"""Everything is put back, on every way out; and a removal that fails is noticed."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import vlm
from support.cases import NAMES, active

import mmfix
import mmfix.engine
from mmfix.errors import ConflictError, RestoreError


def traits(model: Any) -> dict[str, Any]:
    """What the test itself can see of a model: attributes, hooks, forwards, settings, weights."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (
            sorted(module.__dict__),
            {key: len(value) for key, value in module.__dict__.items() if "hooks" in key and hasattr(value, "__len__")},
            id(module.__dict__.get("forward")),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
    found["config"] = repr(model.config.to_dict())
    found["weights"] = {name: (weight.data_ptr(), weight._version) for name, weight in model.named_parameters()}
    return found


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The model has the same traits and bitwise the same outputs afterwards."""
    inputs = vlm.one()
    logits = vlm.logits(model, inputs)  # first: transformers installs hooks of its own at a model's first pass
    before = traits(model)
    yield
    assert traits(model) == before
    assert torch.equal(vlm.logits(model, inputs), logits)


class Stop(Exception):  # noqa: N818
    """Raised by the tests themselves."""


def explode(*args: Any, **kwargs: Any) -> None:
    raise Stop


@pytest.mark.parametrize("name", NAMES)
def test_normal_exit(model: Any, name: str) -> None:
    with unchanged(model), mmfix.mitigate(model, active(name), telemetry=True):
        inside = vlm.greedy(model, vlm.one())
        assert traits(model)["model.language_model"][3] == "mmfix"
        if not any(branch.vision or branch.select for branch in active(name).branches(mmfix.describe(model))):
            assert traits(model)["model.vision_tower"][3] == "sdpa", "the vision tower is not to be touched"
    assert len(inside.logits) == 6


@pytest.mark.parametrize("name", NAMES)
def test_other_attention_settings_come_back(llava: Any, name: str) -> None:
    model = copy.deepcopy(llava)
    model.set_attn_implementation("eager")
    with unchanged(model), mmfix.mitigate(model, active(name)):
        vlm.logits(model, vlm.one())


@pytest.mark.parametrize("name", NAMES)
def test_exception_in_the_block(model: Any, name: str) -> None:
    with unchanged(model), pytest.raises(Stop), mmfix.mitigate(model, active(name)):  # noqa: PT012
        vlm.logits(model, vlm.one())
        raise Stop


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["layers.2.mlp", "layers.0.self_attn.o_proj", "layers.4.self_attn.q_proj", "norm"])
def test_exception_in_the_middle_of_a_forward(model: Any, name: str, where: str) -> None:
    broken = model.model.language_model.get_submodule(where)
    with unchanged(model), pytest.raises(Stop), mmfix.mitigate(model, active(name)):  # noqa: PT012
        handle = broken.register_forward_pre_hook(explode)
        try:
            vlm.logits(model, vlm.one())
        finally:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_after_a_failed_forward_the_block_still_works(model: Any, name: str) -> None:
    with mmfix.mitigate(model, active(name)):
        want = vlm.greedy(model, vlm.one(1))
    with unchanged(model), mmfix.mitigate(model, active(name)):
        handle = model.model.language_model.layers[2].mlp.register_forward_pre_hook(explode)
        with pytest.raises(Stop):
            vlm.logits(model, vlm.one())
        handle.remove()
        got = vlm.greedy(model, vlm.one(1))
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["", "model.language_model.layers.1", "model.language_model.layers.3"])
def test_failed_installation(model: Any, name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = False
    with unchanged(model):
        with monkeypatch.context() as patch:
            patch.setattr(model.get_submodule(where), "register_forward_hook", explode)
            with contextlib.suppress(Stop), mmfix.mitigate(model, active(name)):
                entered = True
        del patch
    if entered and where == "":
        pytest.fail("the broken step was not reached: the test shows nothing")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["close", "collect"])
def test_generator_closed_early(model: Any, name: str, how: str) -> None:
    def stream() -> Iterator[torch.Tensor]:
        with mmfix.mitigate(model, active(name)):
            while True:
                yield vlm.logits(model, vlm.one())

    with unchanged(model):
        running = stream()
        next(running)
        if how == "close":
            running.close()
        else:
            del running
            gc.collect()


@pytest.mark.parametrize(
    ("kept", "message"),
    [("put_back", "config was replaced"), ("pop", "get_compiled_call was replaced"), ("remove", "still has a hook")],
)
def test_a_removal_that_fails_raises(llava: Any, kept: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(contextlib.ExitStack):
        def callback(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            if function.__name__ != kept:
                super().callback(function, *args, **kwargs)

    model = copy.deepcopy(llava)
    monkeypatch.setattr(mmfix.engine, "ExitStack", Forgetful)
    with pytest.raises(RestoreError, match=message), mmfix.mitigate(model, active("vhr")):
        pass


def test_a_hook_that_cannot_be_removed_raises(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(llava)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)
    with pytest.raises(RestoreError, match="hook"), mmfix.mitigate(model, active("var")):
        pass


def test_a_replaced_forward_raises(llava: Any) -> None:
    model = copy.deepcopy(llava)
    with pytest.raises(RestoreError, match=r"layers\.2\.forward"), mmfix.mitigate(model, None):  # noqa: PT012
        layer = model.model.language_model.layers[2]
        layer.__dict__["forward"] = layer.forward


def test_restore_error_keeps_the_cause(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(llava)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)
    with pytest.raises(RestoreError) as caught, mmfix.mitigate(model, active("var")):
        raise Stop
    assert isinstance(caught.value.__context__, Stop)


def test_the_users_own_hooks_stay(llava: Any) -> None:
    model, calls = copy.deepcopy(llava), []
    outside = model.register_forward_hook(lambda *_: calls.append("outside"))
    with mmfix.mitigate(model, active("var")):
        inside = model.model.language_model.layers[1].register_forward_hook(lambda *_: calls.append("inside"))
        vlm.logits(model, vlm.one())
    vlm.logits(model, vlm.one())
    assert calls == ["inside", "outside"] * 2
    outside.remove()
    inside.remove()


@pytest.mark.parametrize("name", NAMES)
def test_nested_blocks_conflict_and_the_outer_one_goes_on(model: Any, name: str) -> None:
    inputs = vlm.one()
    with unchanged(model), mmfix.mitigate(model, active(name)):
        want = vlm.logits(model, inputs)
        for inner in (active(name), None):
            with pytest.raises(ConflictError, match="already"), mmfix.mitigate(model, inner):
                pass
        assert torch.equal(vlm.logits(model, inputs), want)


@pytest.mark.parametrize("name", NAMES)
def test_two_models_at_once(llava: Any, name: str) -> None:
    other, inputs = copy.deepcopy(llava), vlm.one()
    with mmfix.mitigate(llava, active(name)):
        want = vlm.logits(llava, inputs)
        with unchanged(other), mmfix.mitigate(other, active(name)):
            assert torch.equal(vlm.logits(other, inputs), want)
        assert torch.equal(vlm.logits(llava, inputs), want)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_stay_clean(model: Any, name: str) -> None:
    """Nothing of mmfix in what is written during the block, or copied and pickled after it."""
    with mmfix.mitigate(model, active(name)):
        vlm.logits(model, vlm.one())
        assert "mmfix" not in model.config.to_json_string(use_diff=False)
        assert "mmfix" not in model.generation_config.to_json_string()
    assert b"mmfix" not in pickle.dumps(model.config)
    assert copy.deepcopy(model).config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_shares_the_config_object_is_untouched(llava: Any, name: str) -> None:
    """Two models with one config: mitigating the first leaves the second's outputs and settings bit for bit."""
    first = copy.deepcopy(llava)
    second = copy.deepcopy(first, {id(m.config): m.config for m in first.modules() if hasattr(m, "config")})
    assert second.config is first.config
    second.set_attn_implementation("eager")
    inputs = vlm.one()
    want, settings = vlm.logits(second, inputs), traits(second)
    with mmfix.mitigate(first, active(name)):
        assert torch.equal(vlm.logits(second, inputs), want)
        assert traits(second) == settings
        changed = vlm.logits(first, inputs)
        with mmfix.mitigate(second, None):
            assert torch.equal(vlm.logits(first, inputs), changed)
    assert (changed - want).abs().max() > 1e-2
    assert torch.equal(vlm.logits(second, inputs), want)


def test_blocks_left_out_of_order(llava: Any) -> None:
    """Two models with one config, left in the order of entering: each is put back on its own."""
    first = copy.deepcopy(llava)
    second = copy.deepcopy(first, {id(m.config): m.config for m in first.modules() if hasattr(m, "config")})
    with unchanged(first), unchanged(second):
        one, two = (mmfix.mitigate(model, active("var")) for model in (first, second))
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        assert traits(second)["model.language_model"][3] == "mmfix"
        two.__exit__(None, None, None)


def test_what_others_changed_inside_the_block_is_an_error(llava: Any) -> None:
    """A change of attention inside the block that outlives it means that the method may not have run."""
    model = copy.deepcopy(llava)
    with (
        unchanged(model),
        pytest.raises(RestoreError, match="reverse order"),
        mmfix.mitigate(model, active("var")),
    ):
        model.set_attn_implementation("eager")
