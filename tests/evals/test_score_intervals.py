"""Intervals beside the scores of answer files: those of files in which whole images are literally drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mmfix_evals import stats
from mmfix_evals.cli.app import app
from mmfix_evals.metrics import amber, chair, intervals, mme, mmhal, pope, vlind
from mmfix_evals.metrics import hallusionbench as hallusion
from mmfix_evals.metrics.amber_metrics import amber_score_of

ORACLE = json.loads((Path(__file__).parent / "oracle.json").read_text())
RESAMPLES = 120
TEXTS = ("Yes", "No", "yes, there is", "no", "maybe")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", RESAMPLES)


def redrawn(names: Sequence[str], value: Callable[[list[str]], float | None]) -> tuple[float, float, int]:
    """Bounds of the value over files in which the images were drawn with replacement; and how often it is undefined."""
    weights = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    found = [value([name for name, times in zip(names, row, strict=True) for _ in range(times)]) for row in weights]
    defined = [one for one in found if one is not None]
    low, high = np.percentile(defined, [2.5, 97.5])
    return low, high, len(found) - len(defined)


def questions() -> list[dict[str, Any]]:
    return [
        {"question_id": f"{image}-{k}", "image": f"{image}.jpg", "label": ("yes", "no")[(image + k) % 2],
         "category": ("random", "popular")[k // 2], "text": "Is there a cat?", "answer": TEXTS[(3 * image + k * k) % 5]}
        for image in range(7) for k in range(4)
    ]  # fmt: skip


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("parser", ["official", "strict3way"])
def test_pope_draws_images_with_all_their_questions(parser: str) -> None:
    rows = questions()
    drawn = pope.score(rows, rows, parser).to_dict()["intervals"]
    names = sorted({row["image"] for row in rows})

    def value(images: list[str], metric: str) -> float | None:
        listed = [{**row, "question_id": f"{n}/{row['question_id']}"} for n, image in enumerate(images) for row in rows
                  if row["image"] == image]  # fmt: skip
        return getattr(pope.score(listed, listed, parser), metric)

    for metric in pope.METRICS:
        low, high, undefined = redrawn(names, lambda images, metric=metric: value(images, metric))  # type: ignore[misc]
        assert (drawn[metric]["ci_low"], drawn[metric]["ci_high"]) == pytest.approx((low, high), abs=1e-12)
        assert (drawn[metric]["n"], drawn[metric]["n_units"]) == (28, 7)
        assert drawn[metric]["undefined_resamples"] == undefined


@pytest.mark.usefixtures("few")
def test_pope_splits_share_the_drawn_images(tmp_path: Path) -> None:
    rows = questions()
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pope.score_files(path, path)
    assert found["interval_method"] == {
        "name": "percentile bootstrap",
        "unit": "image",
        "n_units": 7,
        "resamples": RESAMPLES,
        "seed": 0,
        "confidence": 0.95,
    }
    parts = {}
    for split in ("random", "popular"):
        part = [row for row in rows if row["category"] == split]
        parts[split] = stats.by_cluster([r["image"] for r in part], [list(pope.counts(r["label"], r["answer"]).values())
                                        for r in part])[1]  # fmt: skip
        expected = stats.bootstrap(parts[split], pope.f1, RESAMPLES)
        own = found["splits"][split]["intervals"]["f1"]
        assert (own["ci_low"], own["ci_high"], own["n"]) == (expected.low, expected.high, 14)
    macro = stats.bootstrap_macro([parts["popular"], parts["random"]], pope.f1, RESAMPLES)
    own = found["intervals"]["macro_f1"]
    assert (own["ci_low"], own["ci_high"], own["n"], own["n_units"]) == (macro.low, macro.high, 28, 7)


@pytest.mark.usefixtures("few")
def test_without_images_the_question_is_drawn_and_it_is_said(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "image"} for row in questions()]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pope.score_files(path, path)
    assert (found["interval_method"]["unit"], found["interval_method"]["n_units"]) == ("question", 28)
    assert found["intervals"]["macro_f1"]["n_units"] == 28  # no question of one split is taken for one of the other
    replies = ["Rating: 4", "Rating: 1"]
    assert mmhal.score([{}, {"image_id": 3}], replies)["interval_method"]["unit"] == "question"
    assert mmhal.score([{"image_id": 3}] * 2, replies)["interval_method"]["n_units"] == 1


@pytest.mark.usefixtures("few")
def test_chair_draws_images() -> None:
    texts = ("A cat and a dog.", "Two hot dogs on a bench.", "A red car.", "", "A cat on a chair near a bed.")
    captions = [{"image_id": n // 2, "caption": texts[(n * n + n // 3) % 5]} for n in range(12)]
    truth = {str(n): {("cat", "dog", "car")[n % 3], "bench"} for n in range(6)}
    drawn = chair.Chair().score(captions, truth).to_dict()["intervals"]
    for metric in chair.METRICS:

        def value(images: list[str], metric: str = metric) -> float | None:
            listed = [row for image in images for row in captions if str(row["image_id"]) == image]
            return getattr(chair.Chair().score(listed, truth), metric)

        low, high, undefined = redrawn(sorted(truth), value)
        assert (drawn[metric]["ci_low"], drawn[metric]["ci_high"]) == pytest.approx((low, high), abs=1e-12)
        assert (drawn[metric]["n"], drawn[metric]["undefined_resamples"]) == (12, undefined)


@pytest.mark.usefixtures("few")
def test_ambers_two_halves_are_drawn_together() -> None:
    items = [{"id": n, "type": "generative", "truth": ["tree"], "hallu": ["dog"]} for n in range(1, 7)]
    items += [{"id": n, "type": "discriminative-hallucination", "truth": "no"} for n in range(7, 13)]
    images = {n: f"{n % 6}.jpg" for n in range(1, 13)}
    data = amber.Amber(items, {"tree": [], "dog": [], "cat": []}, frozenset(), images)
    nouns = [["tree"], ["dog", "tree"], ["cat", "tree", "tree"], ["tree"], ["dog"], ["tree", "cat"]]
    given: list[dict[str, Any]] = [{"id": n, "nouns": one} for n, one in enumerate(nouns, 1)]
    given += [{"id": n, "response": text} for n, text in enumerate(("No", "Yes", "No", "No", "Yes", "No"), 7)]
    found = amber.score(data, given)
    rows = [
        [
            amber.per_image(data, given, block)[image][key]
            for block, keys in (("generative", amber.GENERATIVE_KEYS), ("discriminative", amber.COUNT_KEYS))
            for key in keys
        ]
        for image in sorted(set(images.values()))
    ]
    expected = stats.bootstrap(rows, amber_score_of, RESAMPLES)
    own = found["intervals"]["amber_score"]
    assert expected.value == found["amber_score"]
    assert (own["ci_low"], own["ci_high"]) == (expected.low, expected.high)
    assert (found["interval_method"]["unit"], found["interval_method"]["n_units"]) == ("image", 6)
    unknown = amber.score(amber.Amber(items, data.associations, frozenset()), given)
    assert (unknown["interval_method"]["unit"], unknown["interval_method"]["n_units"]) == ("item", 12)


def bounds(module: Any, per_image: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    rows = [[row[key] for key in module.COUNT_KEYS] for _, row in sorted(per_image.items())]
    found = stats.bootstrap(rows, module.METRICS[name], RESAMPLES)
    return found.low, found.high


def pair(image: int, first: str, second: str) -> list[dict[str, str]]:
    asked = (("Yes", first), ("No", second))
    return [{"image": f"{image}.jpg", "question": right, "gt": right, "pred": said} for right, said in asked]


@pytest.mark.usefixtures("few")
def test_the_other_scorers_draw_what_belongs_together() -> None:
    data = {"count": [row for i in range(9) for row in pair(i, TEXTS[i % 3], TEXTS[(i + 1) % 2])]}
    found = mme.score(data)
    own = found["splits"]["count"]["intervals"]["score"]
    assert (own["ci_low"], own["ci_high"]) == bounds(mme, mme.per_image(data), "count")
    assert (own["n"], own["n_units"]) == (18, 9)
    assert found["intervals"]["perception"]["undefined_resamples"] == RESAMPLES  # nine tasks are missing
    records = [
        {"category": "VD", "subcategory": "map", "set_id": s, "figure_id": f, "question_id": q, "visual_input": f + 1,
         "gt_answer": (s + f) % 2, "answer": TEXTS[(s * q + f) % 4]} for s in range(5) for f in (0, 1) for q in (0, 1)
    ]  # fmt: skip
    judged = hallusion.score(records)
    sets = hallusion.per_image(hallusion.judge_rows(records))
    assert (judged["interval_method"]["unit"], judged["interval_method"]["n_units"]) == ("set of pictures", 5)
    for name in ("aAcc", "qAcc", "yes_difference"):
        for own in (judged["intervals"][name], judged["splits"]["VD"]["intervals"][name]):
            assert (own["ci_low"], own["ci_high"]) == bounds(hallusion, sets, name)
    rated = [{"image_id": n // 2, "question_type": "other"} for n in range(8)]
    replies = [f"Rating: {n * n % 7}" for n in range(8)]
    own = mmhal.score(rated, replies)["splits"]["other"]["intervals"]["score"]
    assert (own["ci_low"], own["ci_high"]) == bounds(mmhal, mmhal.per_image(rated, replies), "score")
    votes = {str(i): 3 if i < 2 else 0 for i in range(12)}
    instances = [{"concept": "c", "context_id": n // 2, "aggregated_human_label_good_images": votes} for n in range(8)]
    names = [f"{stage}{i}" for stage in "abc" for i in (1, 2)] + [f"d{i}/{k}" for k in "01" for i in (1, 2)]
    answers = [{q: ("True", "False")[(q[1] == "2") ^ (hash_ % 5 == 0)] for hash_, q in enumerate(names, n)}
               for n in range(8)]  # fmt: skip
    told = vlind.score(instances, answers)
    contexts = vlind.per_image(instances, answers)
    assert (told["interval_method"]["unit"], told["interval_method"]["n_units"]) == ("context", 4)
    for name in ("s_ck", "s_cb", "acc_lp"):
        for own in (told["intervals"][name], told["splits"]["c"]["intervals"][name]):
            assert (own["ci_low"], own["ci_high"]) == bounds(vlind, contexts, name)
            assert own["n"] == 8


SCORERS = [name for name in ORACLE if name != "about"]


@pytest.mark.parametrize("name", SCORERS)
def test_every_command_says_its_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for file, content in ORACLE[name]["files"].items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        array = isinstance(content, list) and isinstance(content[0], list)
        lines = not array and isinstance(content, list)
        whole = content if isinstance(content, str) else json.dumps(content[0] if array else content)
        path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else whole)
    monkeypatch.chdir(tmp_path)
    command = ["eval", "score", *ORACLE[name]["cases"][0]["command"]]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert found["interval_method"]["name"] == "percentile bootstrap"
    parts = {"": found, **found.get("splits", {})}
    for part in parts.values():
        for metric, drawn in part["intervals"].items():
            value = part[metric]
            assert drawn.keys() == {"ci_low", "ci_high", "n", "n_units", "undefined_resamples"}
            if value is not None and drawn["ci_low"] is not None:
                assert drawn["ci_low"] <= value <= drawn["ci_high"]
                shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
                assert f"{value:.6f} [{drawn['ci_low']:.6f}, {drawn['ci_high']:.6f}]" in shown
    assert any(part["intervals"] for part in parts.values())
