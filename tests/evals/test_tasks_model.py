"""Tasks that need more of a model than one answer: conversations, and attention recorded while it generates."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import mmfix
from mmfix.errors import UsageError as EngineUsageError
from mmfix.methods.lqcd import LQCD
from mmfix_decoding import Decoder, prompts
from mmfix_evals import tasks, tinyworld
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics.grounding import cover_of, ground
from mmfix_evals.tasks import Document
from mmfix_evals.tasks.attention import record_steps
from mmfix_evals.tasks.dialogue import converse, replies
from mmfix_evals.tasks.grounding import grid_of, seen_mask
from mmfix_evals.tasks.leading import wants_questions


@pytest.fixture(scope="module")
def decoder(bundled: Decoder) -> Decoder:
    return bundled


def pictures(count: int) -> list[Any]:
    return [tinyworld.render(tinyworld.scene("dev", n)) for n in range(count)]


# -- conversations -----------------------------------------------------------------------------------------------------


def test_every_turn_reads_the_questions_and_the_models_own_answers(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [["Is there a dog in the image?", "What is in this picture?"], ["Is there a bed?", "Is there a cup?"]]
    seen: list[list[str]] = []
    real = decoder.model.generate

    def watched(**inputs: Any) -> Any:
        seen.append(decoder.processor.tokenizer.batch_decode(inputs["input_ids"]))
        return real(**inputs)

    monkeypatch.setattr(decoder.model, "generate", watched)
    found = converse(decoder, asked, pictures(2), max_new_tokens=12)
    assert len(seen) == 2
    for row, (questions, one) in enumerate(zip(asked, found, strict=True)):
        first, second = ("".join(text[row].lower().split()) for text in seen)
        bare = ["".join(q.lower().split()) for q in questions]
        assert bare[0] in first
        assert bare[1] not in first
        between = second[second.index(bare[0]) + len(bare[0]) : second.index(bare[1])]
        assert "".join(one.replies[0].lower().split()) in between
        assert second.count("<image>") == first.count("<image>") > 0  # the picture stands in the first turn only
        assert replies(one.text) == one.replies
    single = decoder.generate(pictures(2), [q[0] for q in asked], max_new_tokens=12)
    assert [answer.text for answer in single] == [one.replies[0] for one in found]


def test_a_method_acts_in_every_turn_and_sampling_is_refused(decoder: Decoder) -> None:
    asked = [["Is there a dog in the image?"] * 3]
    plain, treated = (converse(d, asked, pictures(1), max_new_tokens=4)[0]
                      for d in (decoder, decoder.with_method("vhr")))  # fmt: skip
    assert plain.report is None
    assert treated.report["prompts"] == 3
    assert treated.report["fired"]["vhr"]["fired"] > 0
    with pytest.raises(UsageError, match="leave do_sample out"):
        converse(decoder, asked, pictures(1), do_sample=True)
    with pytest.raises(UsageError, match="one length"):
        converse(decoder, [["a"], ["a", "b"]], pictures(2))


# -- leading questions -------------------------------------------------------------------------------------------------


def test_a_contrast_with_the_leading_question_gets_the_pair_of_every_document(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.get("tinyworld-sycophancy")
    documents = task.documents("dev", 2, 0)[:6]
    shown = [task.show(document) for document in documents]
    asked: list[tuple[str, str]] = []
    real = LQCD.branches

    def watched(self: LQCD, family: Any) -> Any:
        asked.append(decoder.processor.tokenizer.decode(self.leading))
        return real(self, family)

    monkeypatch.setattr(LQCD, "branches", watched)
    found = task.generate(decoder.with_method([LQCD(beta=1e-9)]), documents, shown, max_new_tokens=1, batch_size=6)
    plain = [document.prompt.rpartition(". ")[2] for document in documents]
    assert [answer.prompt for answer in found] == plain  # in the order asked, without the claims
    assert {_letters(text) for text in asked} == {_letters(d.prompt) + "assistant:" for d in documents}
    counted = found[0].report["fired"]["lqcd"]
    assert counted["considered"] == len(documents)
    assert 0 < counted["fired"] <= len(documents) / 2  # an equal question contrasts with nothing
    greedy = decoder.generate(shown, plain, max_new_tokens=1)
    same = [n for n, d in enumerate(documents) if d.prompt == plain[n]]
    assert [found[n].text for n in same] == [greedy[n].text for n in same]


def test_a_leading_question_of_the_users_own_stays(decoder: Decoder) -> None:
    assert not wants_questions([LQCD(leading=(5, 6)), mmfix.parse("vhr")])
    assert wants_questions([mmfix.parse("vhr"), LQCD()])
    assert not wants_questions(None)


def _letters(text: str) -> str:
    return "".join(text.lower().split())


# -- recorded attention ------------------------------------------------------------------------------------------------


def encoded(decoder: Decoder, count: int) -> dict[str, Any]:
    requests, _ = prompts.pair(pictures(count), ["Please describe this image in detail.", "Is there a dog?"][:count])
    return prompts.encode(prompts.load_images(requests), decoder.processor, decoder.model)


def test_without_a_method_it_is_the_models_own_attention(decoder: Decoder) -> None:
    """Against transformers' eager attention weights, step by step, with left padding."""
    inputs = encoded(decoder, 2)
    with mmfix.mitigate(decoder.model, None, telemetry=True) as fix, record_steps(decoder.model, fix) as record:
        ids = decoder.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    before = decoder.model.config._attn_implementation
    decoder.model.set_attn_implementation("eager")
    try:
        out = decoder.model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    finally:
        decoder.model.set_attn_implementation(before)
    assert torch.equal(out.sequences, ids)
    assert len(record.steps) == len(out.attentions)
    for step, layers in zip(record.steps, out.attentions, strict=True):
        expected = torch.stack([layer[:, :, -1].float().mean(1) for layer in layers]).mean(0)
        torch.testing.assert_close(step, expected, atol=2e-5, rtol=1e-4)
    assert record.image.sum(1).tolist() == [64, 64]


@pytest.mark.parametrize("method", ["vhr", "var:tau=0.1,min_image_mass=0.0,max_sink_share=1.0", "causalmm-language"])
def test_recording_changes_nothing_and_ends_with_the_block(decoder: Decoder, method: str) -> None:
    built = mmfix.parse(method)
    inputs = encoded(decoder, 2)
    with mmfix.mitigate(decoder.model, built) as fix:
        ids = decoder.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = fix.report().to_dict()["fired"]
    with mmfix.mitigate(decoder.model, built, telemetry=True) as fix:
        with record_steps(decoder.model, fix) as record:
            recorded = decoder.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert fix.report().to_dict()["fired"] == expected
        steps = len(record.steps)
        decoder.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert len(record.steps) == steps
    assert torch.equal(ids, recorded)
    assert all(step.shape[0] == 2 for step in record.steps)  # one row per prompt, whatever the branches


def test_an_edit_is_seen_in_the_record(decoder: Decoder) -> None:
    """VAR moves mass towards the image; the record shows as much as the telemetry does."""
    inputs = encoded(decoder, 1)
    moved = mmfix.method("var", sink_dims=(0,), tau=0.7, min_image_mass=0.0, max_sink_share=1.0, first_layer=0)
    masses = []
    for method in (None, moved):
        with (
            torch.inference_mode(),
            mmfix.mitigate(decoder.model, method, telemetry=True) as fix,
            record_steps(decoder.model, fix) as record,
        ):
            decoder.model(**inputs)
            told = fix.masses()
        masses.append(float(record.steps[0][0][record.image[0]].sum()))
        assert masses[-1] == pytest.approx(float(told["image"][0]), abs=1e-4)
    assert masses[1] > masses[0] + 0.01


def test_a_second_prompt_is_refused(decoder: Decoder) -> None:
    inputs = encoded(decoder, 1)
    with mmfix.mitigate(decoder.model, None, telemetry=True) as fix, record_steps(decoder.model, fix):
        decoder.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        with pytest.raises(EngineUsageError, match="second prompt"):
            decoder.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    task = tasks.get("tinyworld-grounding")
    with pytest.raises(UsageError, match="greedy decoding"):
        task.generate(decoder, task.documents("dev", 1, 0), pictures(1), num_beams=2)


# -- grounding ---------------------------------------------------------------------------------------------------------


def test_the_two_measures_by_hand() -> None:
    attention = np.array([[1.0, 2.0], [3.0, 4.0]])
    cover = np.array([[0.0, 0.0], [1.0, 0.5]])
    found = ground(attention, cover)
    assert found == (pytest.approx((3 + 2) / 10), pytest.approx(1.5 / 4), 1, 0.5)
    assert ground(attention, np.array([[1.0, 0.0], [0.0, 0.0]])) == (0.1, 0.25, 0, 0.25)
    assert ground(np.ones((3, 4)), np.full((3, 4), 0.25)).share == pytest.approx(0.25)  # even attention: the area
    assert ground(np.zeros((2, 2)), cover) is None
    assert ground(attention, np.zeros((2, 2))) is None
    for wrong in (np.ones((2, 3)), np.full((2, 2), np.nan), np.full((2, 2), 2.0)):
        with pytest.raises(UsageError):
            ground(attention, wrong)


def test_a_mask_becomes_patches() -> None:
    mask = np.zeros((6, 4))
    mask[:3, :2] = 1
    assert cover_of(mask, (3, 2)).tolist() == [[1, 0], [0.5, 0], [0, 0]]
    with pytest.raises(UsageError, match="does not divide"):
        cover_of(mask, (4, 2))


def test_masks_go_through_the_models_own_image_processor(decoder: Decoder) -> None:
    mask = np.zeros((96, 96), dtype=bool)
    mask[:48, :24] = True
    seen = seen_mask(decoder.processor, mask)
    assert seen.shape == (96, 96)
    assert cover_of(seen, (8, 8)).sum() == pytest.approx(4 * 2, abs=0.3)
    wide = seen_mask(decoder.processor, np.ones((50, 200), dtype=bool))
    assert wide.min() == 1.0


def test_grids() -> None:
    assert grid_of(576, {}, 0, None) == (24, 24)
    with pytest.raises(DataError, match="no 24 x 24 grid"):
        grid_of(577, {}, 0, None)

    class Processor:
        class image_processor:  # noqa: N801
            merge_size = 2

    grids = {"image_grid_thw": torch.tensor([[1, 8, 12], [1, 4, 4]])}
    assert grid_of(24, grids, 0, Processor) == (4, 6)


def test_objects_named_rightly_are_measured_once(decoder: Decoder) -> None:
    task = tasks.get("tinyworld-grounding")
    documents = task.documents("dev", 3, 0)
    shown = [task.show(d) for d in documents]
    answers = task.generate(decoder, documents, shown, max_new_tokens=40, seed=0, batch_size=3)
    plain = decoder.generate(shown, [d.prompt for d in documents], max_new_tokens=40)
    assert [a.text for a in answers] == [a.text for a in plain]
    nodes = 0
    for document, answer in zip(documents, answers, strict=True):
        present = {box[0] for box in document.target["boxes"]}
        names = [one["node"] for one in answer.objects]
        assert len(set(names)) == len(names)
        assert set(names) <= present
        sample = json.loads(json.dumps({**document.target, **task.record(document, answer), "response": answer.text}))
        counts = task.counts(sample, "pattern")
        assert counts["objects"] == len(names)
        assert 0 <= counts["share"] <= len(names)
        for one in answer.objects:
            assert 0 < one["area"] < one["hit_chance"] <= 1
            assert 0 < one["image_mass"] < 1
        nodes += len(names)
    assert nodes > 2


def test_attention_on_the_object_scores_full_marks(decoder: Decoder) -> None:
    """A made-up record in which all attention lies where the named object is."""
    task = tasks.get("tinyworld-grounding")
    document = Document("x", "dev", "x", "?", {"boxes": [["dog", 0, 0, 24, 24], ["cat", 60, 60, 20, 20]]})
    on_dog = torch.zeros(64, dtype=torch.float64)
    on_dog[0] = 0.5
    text, spans = "a dog and a cat", [(0, 1), (1, 5), (5, 9), (9, 11), (11, 15)]
    found = task._measure(decoder.processor, document, text, spans, [on_dog] * 5, {}, 0)
    assert [one["node"] for one in found] == ["dog", "cat"]
    assert (found[0]["share"], found[0]["hit"], found[0]["image_mass"]) == (1.0, 1, 0.5)
    assert (found[1]["share"], found[1]["hit"]) == (0.0, 0)
