"""What cannot be done is refused, with an error of the right kind that names the remedy; the model stays as it was."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from support import vlm
from support.cases import NAMES, active
from torch import nn

import mmfix
from mmfix.errors import ConflictError, MethodError, MmfixError, UnsupportedModel, UsageError
from mmfix.methods import VAR, VHR


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_without_ids_need_an_image_mask(llava: Any, name: str) -> None:
    embeds = torch.randn(1, 8, vlm.HIDDEN)
    with mmfix.mitigate(llava, active(name)) as fix:
        with pytest.raises(MmfixError, match="image_mask"):
            llava(inputs_embeds=embeds)
        fix.image_mask = torch.zeros(1, 5, dtype=torch.bool)
        with pytest.raises(MmfixError, match="does not fit"):
            llava(inputs_embeds=embeds)


@pytest.mark.parametrize("mask", [torch.zeros(8, dtype=torch.bool), torch.zeros(1, 8)])
def test_a_malformed_image_mask(llava: Any, mask: torch.Tensor) -> None:
    with mmfix.mitigate(llava, None) as fix, pytest.raises(UsageError, match="image_mask"):
        fix.image_mask = mask


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_from_outside(llava: Any, name: str) -> None:
    with torch.no_grad():
        cache = llava(**vlm.one(), use_cache=True).past_key_values
    with mmfix.mitigate(llava, active(name)), pytest.raises(MmfixError, match="before the prompt"):
        llava(input_ids=torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_another_prompt(llava: Any, name: str) -> None:
    """Prompt A, then prompt B, then a step of A: the spans at hand are B's, so the step must not run."""
    with torch.no_grad(), mmfix.mitigate(llava, active(name)):
        cache = llava(**vlm.one(0, after=4), use_cache=True).past_key_values
        llava(**vlm.one(1, after=9, system=8), use_cache=True)
        with pytest.raises(MmfixError):
            llava(input_ids=torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
def test_training_mode(llava: Any, name: str) -> None:
    model = copy.deepcopy(llava).train()
    with mmfix.mitigate(model, active(name)), pytest.raises(MmfixError, match=r"model\.eval\(\)"):
        model(**vlm.one())


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_model_called_on_its_own(llava: Any, name: str) -> None:
    with torch.no_grad(), mmfix.mitigate(llava, active(name)):
        for _ in range(2):  # before and after a whole call
            with pytest.raises(MmfixError, match="not one of its parts"):
                llava.model(**vlm.one())
            with pytest.raises(MmfixError, match="not one of its parts"):
                llava.model.language_model(input_ids=torch.tensor([[1, 2, 3]]))
            llava(**vlm.one())


@pytest.mark.parametrize("name", NAMES)
def test_a_part_called_after_a_failed_pass(llava: Any, name: str) -> None:
    def explode(*args: Any) -> None:
        raise KeyError

    with torch.no_grad(), mmfix.mitigate(llava, active(name)):
        handle = llava.model.language_model.norm.register_forward_pre_hook(explode)
        with pytest.raises(KeyError):
            llava(**vlm.one())
        handle.remove()
        with pytest.raises(MmfixError, match="not one of its parts"):
            llava.model(**vlm.one())


@pytest.mark.parametrize("name", NAMES)
def test_no_inputs(llava: Any, name: str) -> None:
    with mmfix.mitigate(llava, active(name)), pytest.raises(MmfixError, match="neither input_ids nor inputs_embeds"):
        llava(attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("varr", {}, r"unknown method 'varr' \(did you mean 'var'\?\); choose one of: .*vhr"),
        ("greedy", {}, "unknown method"),
        ("vhr", {"alhpa": 2.0}, r"no parameter 'alhpa' \(did you mean 'alpha'\?\); its parameters: alpha, layers"),
        ("var", {"move": 1.5, "sink_dims": (1,)}, r"var\.move=1\.5: give a number from 0 to 1"),
        ("var", {"move": -0.1, "sink_dims": (1,)}, r"var\.move=-0\.1"),
        ("var", {"move": "0.4", "sink_dims": (1,)}, r"var\.move='0\.4'"),
        ("var", {"move": float("nan"), "sink_dims": (1,)}, r"var\.move=nan"),
        ("var", {"min_image_mass": 2, "sink_dims": (1,)}, r"var\.min_image_mass"),
        ("var", {"max_sink_share": True, "sink_dims": (1,)}, r"var\.max_sink_share=True"),
        ("var", {"tau": -1, "sink_dims": (1,)}, r"var\.tau"),
        ("var", {"first_layer": -1, "sink_dims": (1,)}, r"var\.first_layer"),
        ("var", {"variant": "papers", "sink_dims": (1,)}, "choose 'paper' or 'release'"),
        ("var", {"sink_dims": (vlm.HIDDEN,)}, f"give dimensions from 0 to {vlm.HIDDEN - 1}"),
        ("var", {"sink_dims": (-1,)}, "give dimensions from 0"),
        ("var", {"sink_dims": ()}, "give dimensions from 0"),
        ("var", {"sink_dims": 5}, "method 'var'"),
        ("var", {"sink_dims": ("a",)}, "method 'var'"),
        ("vhr", {"alpha": -1.0}, r"vhr\.alpha=-1\.0"),
        ("vhr", {"alpha": None}, r"vhr\.alpha=None"),
        ("vhr", {"layers": 3}, "method 'vhr'"),
        (VHR(), {"alpha": 3.0}, "without a single method name"),
        (["vhr"], {"layer": 3}, "no parameter 'layer'"),
        (None, {"alpha": 3.0}, "without a single method name"),
        ([7], {}, "7 is not a method"),
    ],
)
def test_malformed_methods(llava: Any, method: Any, params: dict[str, Any], message: str) -> None:
    before = llava.config.text_config._attn_implementation
    with pytest.raises(MethodError, match=message), mmfix.mitigate(llava, method, **params):
        pass
    assert llava.config.text_config._attn_implementation == before


@pytest.mark.parametrize("method", [7, VHR])
def test_what_is_no_method_is_a_method_error(llava: Any, method: Any) -> None:
    with pytest.raises(MethodError), mmfix.mitigate(llava, method):
        pass


@pytest.mark.parametrize("layers", [(99,), (-9,), ()])
def test_layers_that_the_model_does_not_have(llava: Any, layers: tuple[int, ...]) -> None:
    with pytest.raises(MethodError, match="layers"), mmfix.mitigate(llava, VHR(layers=layers)):
        pass


def test_var_on_an_unknown_model_names_the_command(llava: Any) -> None:
    for method in ("var", VAR()):
        with pytest.raises(MethodError, match="mmfix calibrate sinks") as caught, mmfix.mitigate(llava, method):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_method_twice(llava: Any, name: str) -> None:
    with pytest.raises(ConflictError, match=name), mmfix.mitigate(llava, [active(name), active(name)]):
        pass


def test_an_unknown_backend(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFIX_BACKEND", "cuda")
    with pytest.raises(UsageError, match=r"MMFIX_BACKEND='cuda'.*sdpa"), mmfix.mitigate(llava, None):
        pass


def test_what_is_no_vision_language_model(llava: Any) -> None:
    for thing in (nn.Linear(2, 2), object(), llava.model.language_model):
        with pytest.raises(UnsupportedModel), mmfix.mitigate(thing, None):
            pass


def test_continuous_batching_is_refused(llava: Any) -> None:
    with mmfix.mitigate(llava, active("var")):
        for name in ("generate_batch", "init_continuous_batching"):
            with pytest.raises(MmfixError, match="continuous batching"):
                getattr(llava, name)([[1, 2, 3]])
    assert "generate_batch" not in llava.__dict__


def test_a_second_thread_is_refused_and_the_first_goes_on(llava: Any) -> None:
    """While one thread is inside a pass another one's call raises; the first one's tokens are its own."""
    inputs, inside, release = vlm.one(), threading.Event(), threading.Event()
    results: list[Any] = []

    def wait(*_: Any) -> None:
        inside.set()
        assert release.wait(30)

    with mmfix.mitigate(llava, active("vhr")):
        want = vlm.greedy(llava, inputs, 4)
        middle = llava.model.language_model.layers[2].mlp.register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: results.append(vlm.greedy(llava, inputs, 4)))
        thread.start()
        assert inside.wait(30)
        with pytest.raises(MmfixError, match="second thread"):
            vlm.logits(llava, vlm.one(1))
        release.set()
        thread.join(30)
        middle.remove()
        again = vlm.greedy(llava, inputs, 4)
    for got in (results[0], again):
        assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_another_prompt_between_steps_is_not_continued(llava: Any) -> None:
    """A prompt scored without a cache in between: the first one's next step is refused, not given other spans."""
    first, second = vlm.one(), vlm.one(5, after=12, system=7)
    total = first["input_ids"].shape[1]
    step = {"input_ids": torch.tensor([[17]]), "attention_mask": torch.ones(1, total + 1)}
    with torch.no_grad(), mmfix.mitigate(llava, active("var")):
        out = llava(**first, use_cache=True)
        llava(**second, use_cache=False)
        with pytest.raises(MmfixError, match="not the one mitigate"):
            llava(**step, past_key_values=out.past_key_values)


def test_a_thread_between_the_steps_of_a_generation_is_refused(llava: Any) -> None:
    inputs, failures = vlm.one(), []

    def other() -> None:
        try:
            vlm.logits(llava, vlm.one(5))
        except MmfixError as error:
            failures.append(str(error))

    def between(ids: Any, scores: Any) -> Any:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return scores

    with mmfix.mitigate(llava, active("var")):
        want = vlm.greedy(llava, inputs, 3)
        got = vlm.greedy(llava, inputs, 3, logits_processor=[between])
    assert len(failures) == 3
    assert "second thread" in failures[0]
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_a_call_from_inside_a_pass_is_refused(llava: Any) -> None:
    handle = llava.model.language_model.layers[4].register_forward_hook(lambda *_: vlm.logits(llava, vlm.one(5)))
    try:
        with mmfix.mitigate(llava, active("causalmm-language")), pytest.raises(MmfixError, match="inside its own"):
            vlm.logits(llava, vlm.one())
    finally:
        handle.remove()


def test_after_an_interrupt_another_thread_may_go_on(llava: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    results: list[Any] = []
    with mmfix.mitigate(llava, active("var")):
        handle = llava.lm_head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            vlm.logits(llava, vlm.one())
        handle.remove()
        thread = threading.Thread(target=lambda: results.append(vlm.logits(llava, vlm.one())))
        thread.start()
        thread.join()
    assert len(results) == 1


def test_no_loss_of_mixed_logits_and_no_copy_inside_the_block(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, active("causalmm-language")):
        with pytest.raises(MmfixError, match="no loss"):
            llava(**inputs, labels=inputs["input_ids"])
        with pytest.raises(MmfixError, match="leave the block"):
            copy.deepcopy(llava)
    with (
        pytest.raises(MethodError, match="layers from -5 to 4"),
        mmfix.mitigate(llava, "mma", until="prompt", layers=(99,)),
    ):
        pass


def test_counters_outlive_inference_mode_and_caches_do_not_outlive_their_use(llava: Any) -> None:
    with mmfix.mitigate(llava, active("var")) as fix:
        with torch.inference_mode():
            llava(**vlm.one())
        vlm.logits(llava, vlm.one())
        out = vlm.greedy(llava, vlm.one(), 2)
        cache = weakref.ref(out.past_key_values)
        del out
        gc.collect()
        assert cache() is None
    assert fix.report().fired["var"].fired > 0


def test_positional_inputs_and_logits_to_keep_change_nothing(llava: Any) -> None:
    inputs = vlm.batch([vlm.tokens(3, "image", 6)], vlm.picture(), width=26)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids")
    with torch.no_grad(), mmfix.mitigate(llava, active("vhr")):
        want = llava(**inputs).logits[:, -1]
        placed = llava(*(inputs[name] for name in names)).logits[:, -1]
        kept = llava(**inputs, use_cache=True, logits_to_keep=5).logits[:, -1]
    assert torch.equal(placed, want)
    torch.testing.assert_close(kept, want, atol=1e-5, rtol=0)


def test_a_contrast_that_edits_no_layer_never_fires(llava: Any) -> None:
    with mmfix.mitigate(llava, "causalmm-language", language_layers=()) as fix:
        vlm.greedy(llava, vlm.one(), 3)
        report = fix.report()
    assert report.fired["causalmm-language"].fired == 0
    assert any("never fired" in note for note in report.notes)
