"""The core of the contract for every registered method in families that differ from LLaVA where it matters.

LLaVA-NeXT: tiles and newline slots among the image tokens. Qwen2.5-VL: pictures packed in windows of one row, positions
along several axes, markers around the image. Gemma 3: sliding windows, image tokens that see each other. Idefics2: a
perceiver between tower and language model. (Oracles for all families are in tests/families.)
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import pytest
import torch
from support import steered
from support.cases import CASES, NAMES, Case
from support.families import FAMILIES, Row, Tiny

import mmfix
from mmfix.errors import ConflictError, MmfixWarning
from mmfix.families import why_not
from mmfix.method import Method
from mmfix.registry import method

CHOSEN = ("llava-next", "qwen2.5-vl", "gemma3", "idefics2")
STEPS = 3
REFUSED = json.loads((files("mmfix_evals") / "families.json").read_text())
# Four layers instead of five: edits begin a layer earlier.
MORE: dict[str, dict[str, Any]] = {
    "act": {"heads": tuple((layer, head) for layer in range(1, 4) for head in range(4))},
    "var": {"sink_dims": (3, 7, 12, 20), "tau": 1.5, "first_layer": 1},
}


@functools.cache
def _built(name: str) -> Any:
    model = FAMILIES[name].build()
    greedy(model, FAMILIES[name].inputs())  # transformers leaves marks of its own at the first call
    return steered.calibrated(model)


@pytest.fixture(params=CHOSEN)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return FAMILIES[request.param]


@pytest.fixture
def model(tiny: Tiny) -> Any:
    """Do not change it."""
    return _built(tiny.name)


@pytest.fixture(params=NAMES)
def acting(request: pytest.FixtureRequest, model: Any) -> Method:
    """Each registered method that applies to the family, with parameters that make it act."""
    found = method(request.param, **{**CASES.get(request.param, Case()).active, **MORE.get(request.param, {})})
    reason = why_not(mmfix.describe(model), found)
    if reason:
        pytest.skip(f"does not apply: {reason}")
    return found


@pytest.fixture(autouse=True)
def _served(tiny: Tiny, acting: Method) -> None:
    """Methods that a family refuses are refused as docs/families.md says (tests/families/test_table.py)."""
    reason = REFUSED[acting.info.name]["refused"].get(tiny.title)
    if reason:
        pytest.skip(f"refused: {reason}")


# What a method would do, the model does by itself.
NATIVE = {("gemma3", "frame-block")}


def greedy(model: Any, inputs: dict[str, Any], **extra: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": list(range(90, 100))}
    results = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **options, **results, **extra)


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, use_cache=False).logits
    return found


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5 * float(want[want.isfinite()].abs().max()), rtol=0)


def traits(model: Any) -> Any:
    return [
        (name, sorted(vars(module)), id(vars(module).get("config")), len(module._forward_hooks),
         len(module._forward_pre_hooks), getattr(vars(module).get("config"), "_attn_implementation", None))
        for name, module in model.named_modules()
    ], [(p.data_ptr(), p._version) for p in model.parameters()]  # fmt: skip


def test_it_acts_and_is_gone_afterwards(tiny: Tiny, model: Any, acting: Method) -> None:
    """Changes logits and says so; nothing is left after a return and an exception; nesting is a conflict."""
    if (tiny.name, acting.info.name) in NATIVE:
        pytest.skip("the model does so by itself")
    inputs = tiny.inputs(padded=True)
    plain, before = logits(model, inputs), traits(model)
    with mmfix.mitigate(model, acting, telemetry=True) as fix:
        inside = logits(model, inputs)
        masses = fix.masses()
        with pytest.raises(ConflictError), mmfix.mitigate(model, acting):
            pass
    assert (inside - plain).abs().max() > 1e-3
    assert fix.report().fired[acting.info.name].fired > 0
    assert masses is not None
    torch.testing.assert_close(masses["image"] + masses["text"], torch.ones(2), atol=1e-5, rtol=0)
    assert traits(model) == before
    with pytest.raises(KeyError), mmfix.mitigate(model, acting):  # noqa: PT012
        greedy(model, inputs)
        raise KeyError
    assert traits(model) == before
    assert torch.equal(logits(model, inputs), plain)


def test_strength_zero_is_bitwise_nothing(tiny: Tiny, model: Any, acting: Method) -> None:
    identity = CASES.get(acting.info.name, Case()).identity
    if identity is None:
        pytest.skip("has no strength of zero")
    inputs = tiny.inputs(padded=True)
    plain = logits(model, inputs)
    with mmfix.mitigate(model, acting.info.name, **identity):
        assert torch.equal(logits(model, inputs), plain)


def test_a_failure_at_any_step_of_installation(
    tiny: Tiny, model: Any, acting: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = traits(model), logits(model, tiny.inputs())
    originals = {
        name: getattr(torch.nn.Module, name) for name in ("register_forward_hook", "register_forward_pre_hook")
    }
    calls, limit = 0, 0

    def failing(name: str) -> Any:
        def register(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyError(name)
            return originals[name](self, *args, **kwargs)

        return register

    for name in originals:
        monkeypatch.setattr(torch.nn.Module, name, failing(name))
    while True:
        calls = 0
        try:
            with mmfix.mitigate(model, acting):
                break
        except KeyError:
            assert traits(model) == before, limit
        limit += 1
    assert limit >= 3, "few steps were reached: the test shows little"
    monkeypatch.undo()
    assert torch.equal(logits(model, tiny.inputs()), plain)


def test_ragged_rows_with_one_and_two_pictures_equal_single_runs(tiny: Tiny, model: Any, acting: Method) -> None:
    rows: list[Row] = [[1, 20, "image", 31, 32, "image", 43, 44, 45, 46], [1, "image", 50, 51]]
    with mmfix.mitigate(model, acting):
        together = greedy(model, tiny.batch(rows)).logits
        singles = [greedy(model, tiny.batch(rows[:1])).logits, greedy(model, tiny.batch(rows[1:], 2)).logits]
    for step in range(STEPS):
        for n, single in enumerate(singles):
            close(together[step][n], single[step][0])


def test_a_prompt_without_an_image_is_left_alone_with_one_warning(tiny: Tiny, model: Any, acting: Method) -> None:
    inputs = tiny.batch([[1, 20, 21, 22, 23, 24]])
    plain = greedy(model, inputs)
    with mmfix.mitigate(model, acting), pytest.warns(MmfixWarning, match="no image tokens") as warned:
        first, second = greedy(model, inputs), greedy(model, inputs)
    assert len([w for w in warned if issubclass(w.category, MmfixWarning)]) == 1
    for got in (first, second):
        assert torch.equal(got.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


class Ears:
    """A streamer that may stop listening."""

    def __init__(self, patience: int) -> None:
        self.heard: list[int] = []
        self.patience = patience

    def put(self, tokens: torch.Tensor) -> None:
        if len(self.heard) == self.patience:
            raise KeyError
        self.heard += tokens.flatten().tolist()[-1:]

    def end(self) -> None:
        pass


def test_a_stream_says_what_generate_says_and_may_be_left(tiny: Tiny, model: Any, acting: Method) -> None:
    inputs, ears = tiny.inputs(), Ears(99)
    before = traits(model)
    with mmfix.mitigate(model, acting):
        want = greedy(model, inputs).sequences[0, -STEPS:].tolist()
        greedy(model, inputs, streamer=ears)
        assert ears.heard[-STEPS:] == want
        with pytest.raises(KeyError):
            greedy(model, inputs, streamer=Ears(2))
        assert greedy(model, inputs).sequences[0, -STEPS:].tolist() == want
    assert traits(model) == before


def test_beams_are_scored_by_the_mitigated_model(tiny: Tiny, model: Any, acting: Method) -> None:
    inputs = tiny.inputs(padded=True)
    with mmfix.mitigate(model, acting):
        cached = greedy(model, inputs, num_beams=2).sequences
        assert torch.equal(greedy(model, inputs, num_beams=2, use_cache=False).sequences, cached)
