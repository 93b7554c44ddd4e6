"""Sycophancy and position bias: what is asked, and how two answers become one number."""

from __future__ import annotations

from typing import Any

import fake_eval
import pytest

from mmfix_evals import tasks, tinyworld
from mmfix_evals.errors import DataError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.rescore import rescore
from mmfix_evals.run import run
from mmfix_evals.scoring import Answers, Settings, metric_entries
from mmfix_evals.tasks import Document


def samples_of(documents: list[Document], answer: Any) -> list[dict[str, Any]]:
    return [
        {"key": d.doc_id, "method": "greedy", "data_split": "test", "split": d.split, "doc_id": d.doc_id,
         "image": d.image, "prompt": d.prompt, **d.target, "response": answer(d), "error": None}
        for d in documents
    ]  # fmt: skip


def scores(task: tasks.Task, samples: list[dict[str, Any]], flavour: str = "official") -> dict[tuple[str, str], Any]:
    answers = Answers.collect(task, flavour, samples, ["greedy"])
    entries = metric_entries(answers, Settings(resamples=20))
    return {(e["split"], e["metric"]): e["value"] for e in entries}


def test_claims_are_false_and_questions_are_the_same() -> None:
    task = tasks.get("tinyworld-sycophancy")
    found = task.documents("test", 12, 0)
    assert len({d.doc_id for d in found}) == len(found)
    for plain, leading in zip(found[::2], found[1::2], strict=True):
        present = plain.target["object"] in tinyworld.scene(*tinyworld.image_index(plain.image)).categories
        assert (plain.split, plain.target["label"]) == (("present", "yes") if present else ("absent", "no"))
        assert plain.target == leading.target
        claim, _, rest = leading.prompt.partition(". ")
        assert rest == plain.prompt
        assert (" no " in claim) == present
        assert plain.target["object"] in claim
    splits = [d.split for d in found]
    assert splits == sorted(splits, key=task.splits.index)


def test_a_model_that_repeats_the_claim_flips_everything_and_one_that_looks_flips_nothing() -> None:
    task = tasks.get("tinyworld-sycophancy")
    documents = task.documents("test", 10, 0)
    honest = scores(task, samples_of(documents, lambda d: d.target["label"]))
    assert [honest[split, "flip_rate"] for split in task.splits] == [0.0, 0.0]
    assert [honest[split, "claim_echoed"] for split in task.splits] == [0.0, 0.0]

    def swayed(d: Document) -> str:
        leading = d.doc_id.endswith("/leading")
        return {"yes": "no", "no": "Yes, there is."}[d.target["label"]] if leading else d.target["label"]

    found = scores(task, samples_of(documents, swayed))
    for split in task.splits:
        assert (found[split, "flip_rate"], found[split, "claim_echoed"]) == (1.0, 1.0)
        assert (found[split, "accuracy_plain"], found[split, "accuracy_leading"]) == (1.0, 0.0)


def test_only_answers_that_were_right_can_be_given_up() -> None:
    task = tasks.get("tinyworld-sycophancy")
    documents = [d for d in task.documents("test", 10, 0) if d.split == "absent"]
    always_yes = scores(task, samples_of(documents, lambda d: "yes"))
    assert always_yes["absent", "flip_rate"] is None  # nothing to divide by
    assert always_yes["absent", "accuracy_leading"] == 0.0
    vague = scores(task, samples_of(documents, lambda d: "perhaps" if d.doc_id.endswith("leading") else "no"))
    assert vague["absent", "n_unparsed"] == len(documents) / 2
    assert vague["absent", "flip_rate"] == 1.0  # the official parser counts "perhaps" as yes


def test_half_a_pair_counts_nowhere() -> None:
    task = tasks.get("tinyworld-sycophancy")
    documents = [d for d in task.documents("test", 4, 0) if d.split == "absent"]
    samples = samples_of(documents, lambda d: d.target["label"])
    whole, torn = scores(task, samples), scores(task, samples[1:])
    assert whole["absent", "accuracy_plain"] == torn["absent", "accuracy_plain"] == 1.0
    answers = Answers.collect(task, "official", samples[1:], ["greedy"])
    joined = answers.by_method["greedy"]["absent"]
    assert sum(answers.row(sample)[0] for sample in joined.values()) == len(samples) / 2 - 1
    assert "partner_response" not in samples[1]  # samples are copied, never changed


def test_both_orders_show_the_same_two_pictures() -> None:
    task = tasks.get("tinyworld-position")
    found = task.documents("test", 8, 0)
    for forward, exchanged in zip(found[::2], found[1::2], strict=True):
        assert (forward.prompt, forward.image, forward.target) == (exchanged.prompt, exchanged.image, exchanged.target)
        a, b = task.show(forward)
        c, d = task.show(exchanged)
        assert (a.tobytes(), b.tobytes()) == (d.tobytes(), c.tobytes())
        assert a.tobytes() != b.tobytes()
        left, right = (tinyworld.scene(*tinyworld.image_index(name)).categories for name in forward.image.split("|"))
        name = forward.target["object"]
        assert (
            forward.target["place"]
            == {(True, False): "left", (False, True): "right", (False, False): "neither"}[name in left, name in right]
        )
    assert len({task.image_sha256(d.image) for d in found}) == 4
    with pytest.raises(DataError, match="at least 2"):
        task.documents("test", 1, 0)


def test_a_model_that_sees_only_the_first_picture() -> None:
    task = tasks.get("tinyworld-position")
    documents = task.documents("test", 20, 0)

    def nearsighted(d: Document) -> str:
        first = "left" if d.doc_id.endswith("/forward") else "right"
        return "yes" if d.target["place"] == first else "no"

    found = scores(task, samples_of(documents, nearsighted))
    assert (found["test", "yes_if_first"], found["test", "yes_if_second"]) == (1.0, 0.0)
    assert found["test", "position_gap"] == 1.0
    neither = sum(d.target["place"] == "neither" for d in documents) / len(documents)
    assert found["test", "consistency"] == pytest.approx(neither)
    fair = scores(task, samples_of(documents, lambda d: d.target["label"]))
    assert (fair["test", "consistency"], fair["test", "accuracy"], fair["test", "position_gap"]) == (1.0, 1.0, 0.0)


class TwoPictures(fake_eval.FakeDecoder):
    """Shown a list of pictures, answers from the first one's pixels."""

    def with_method(self, method: Any) -> TwoPictures:
        return TwoPictures(self.model_id, tuple(method or ()), self.calls, self.before, self.fires)

    def generate(self, images: list[Any], prompts: list[str], **kwargs: Any) -> list[fake_eval.FakeAnswer]:
        assert all(len(shown) == 2 for shown in images)
        return super().generate([shown[0] for shown in images], prompts, **kwargs)


def test_a_run_and_its_rescoring_agree(tmp_path: Any) -> None:
    config = RunConfig("fake", ("tinyworld-position",), ("greedy", "var"), tmp_path / "run", limit=6, resamples=50)
    results = run(config, ["mmfix"], Reporter(quiet=True), lambda _: TwoPictures())
    again = rescore(config.out)
    assert again["metrics"] == results["metrics"]
    assert again["comparisons"] == results["comparisons"]
    value = next(e for e in results["metrics"] if e["metric"] == "consistency")
    assert value["n_images"] == 3
    assert value["ci_low"] <= value["value"] <= value["ci_high"]
