"""One batch, two answers: each row is what its side gives alone, and the weights are the model's own."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from support import steered
from support.cases import active

import mmfix
from mmfix import Method
from mmfix.confine import confine
from mmfix.errors import ConflictError
from mmfix.recording import record_attention
from mmfix_decoding import Decoder, TokenEvent, prompts
from mmfix_decoding.prompts import Request
from mmfix_kernels import Group, HeadScale, MapReplacement, ScoreEdit

QUESTION = "describe this image please"


def sides(events: list[TokenEvent]) -> tuple[list[int], list[int]]:
    plain, method = ([e.token_id for e in events if e.side == side] for side in ("plain", "method"))
    return plain, method


# Methods that act on whole batches, so that the plain answer comes from a run of its own.
ALONE = ("jrt", "memvr", "pine", "positional-hidden", "token-prepending", "vista", "vti")
STREAMED = [name for name, info in mmfix.methods().items() if info.kind != "search"]


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3}], ids=["greedy", "sample"]
)
@pytest.mark.parametrize("name", STREAMED)
def test_each_side_is_what_it_is_alone(
    decoder: Decoder, pictures: list[Image.Image], name: str, sampling: dict[str, Any]
) -> None:
    if name == "vti":
        steered.calibrated(decoder.model)
    treated = decoder.with_method(active(name))
    stream = treated.stream_pair(pictures[0], QUESTION, max_new_tokens=8, **sampling)
    plain, method = sides(list(stream))
    assert plain == decoder.generate(pictures[0], QUESTION, max_new_tokens=8, **sampling).token_ids
    assert method == treated.generate(pictures[0], QUESTION, max_new_tokens=8, **sampling).token_ids
    assert stream.report is not None
    assert stream.report["one_batch"] is (name not in ALONE)


def test_the_method_acts_in_its_row_only(decoder: Decoder, pictures: list[Image.Image]) -> None:
    stream = decoder.with_method("vhr").stream_pair(pictures[0], QUESTION, max_new_tokens=6)
    events = list(stream)
    first = {e.side: e for e in events if e.index == 0}
    alone = next(iter(decoder.stream(pictures[0], QUESTION, max_new_tokens=6)))
    assert first["plain"].logprob == pytest.approx(alone.logprob, abs=1e-5)
    assert first["method"].logprob != pytest.approx(alone.logprob, abs=1e-3)
    assert stream.report is not None
    assert stream.report["fired"]["vhr"]["fired"] > 0


def test_the_image_weights_are_the_eager_maps(decoder: Decoder, pictures: list[Image.Image]) -> None:
    events = list(decoder.with_method(active("var")).stream_pair(pictures[1], QUESTION, max_new_tokens=3))
    model = copy.deepcopy(decoder.model)
    model.set_attn_implementation("eager")
    inputs = prompts.encode([Request(QUESTION, (pictures[1],)).load()], decoder.processor, model)
    image = inputs["input_ids"][0] == 4
    for event in [e for e in events if e.side == "plain"][:2]:
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
        want = torch.stack(maps)[:, 0, :, -1, : image.numel()].mean((0, 1))[image]
        assert event.image_weights == pytest.approx(want.tolist(), abs=1e-5)
        token = torch.tensor([[event.token_id]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    changed = [e for e in events if e.side == "method"]
    assert all(sum(e.image_weights or ()) == pytest.approx((e.masses or {})["image"], abs=1e-5) for e in changed)
    assert changed[0].image_weights != pytest.approx(events[0].image_weights, abs=1e-4)


@dataclass(frozen=True, kw_only=True)
class Everything(Method):
    """Edits of every kind, on all rows."""

    def edits(self, site: Any) -> Any:
        return [
            ScoreEdit(group=Group.IMAGE, bias=2.0), HeadScale(scale=torch.full((4,), 0.5)),
            MapReplacement(kind="uniform"),
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unknown(Method):
    """An edit that cannot be told to act on some rows."""

    def edits(self, site: Any) -> Any:
        @dataclass(frozen=True)
        class NewEdit:
            strength: float = 1.0

        return [NewEdit()]


def named(cls: type[Method]) -> Method:
    cls.info = dataclasses.replace(mmfix.methods()["vhr"], name=cls.__name__.lower(), params={}, cls=cls)
    return cls()


def test_every_kind_of_edit_is_confined(decoder: Decoder, pictures: list[Image.Image]) -> None:
    treated = decoder.with_method(named(Everything))
    plain, method = sides(list(treated.stream_pair(pictures[2], QUESTION, max_new_tokens=6)))
    assert plain == decoder.generate(pictures[2], QUESTION, max_new_tokens=6).token_ids
    assert method == treated.generate(pictures[2], QUESTION, max_new_tokens=6).token_ids
    assert plain != method


def test_a_method_that_cannot_be_confined_is_refused(decoder: Decoder, pictures: list[Image.Image]) -> None:
    class Whole(Method):
        def wants_sinks(self, layer: int, num_layers: int) -> bool:
            return False

    assert isinstance(confine(named(Whole), (True, False)), Whole)
    extra = type("Extra", (Method,), {"check": Method.check, "info": mmfix.methods()["vhr"]})
    Method.new_answer = lambda self: None  # type: ignore[attr-defined]
    try:
        extra.new_answer = lambda self: 1  # type: ignore[attr-defined]
        with pytest.raises(ConflictError, match="new_answer"):
            confine(extra(), (True, False))
    finally:
        del Method.new_answer  # type: ignore[attr-defined]


def test_cancelling_frees_the_model(decoder: Decoder, pictures: list[Image.Image]) -> None:
    stream = decoder.with_method("vhr").stream_pair(pictures[0], QUESTION, max_new_tokens=200, min_new_tokens=200)
    next(stream)
    stream.close()
    assert len(decoder.generate(pictures[0], QUESTION, max_new_tokens=2).token_ids) > 0


def test_a_row_needs_telemetry_to_be_recorded(decoder: Decoder, pictures: list[Image.Image]) -> None:
    inputs = prompts.encode([Request(QUESTION, (pictures[0],)).load()], decoder.processor, decoder.model)
    with mmfix.mitigate(decoder.model, None, telemetry=True), record_attention(decoder.model) as recorder:
        assert recorder.weights() is None
        with torch.no_grad():
            decoder.model(**inputs)
        found = recorder.weights()
    assert found is not None
    assert found.shape == (4, 1, 4, inputs["input_ids"].shape[1])
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)
