"""The registry and the TinyWorld tasks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmfix_evals import tasks, tinyworld
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import chair
from mmfix_evals.tasks import base


def test_unknown_tasks_list_the_choices() -> None:
    with pytest.raises(
        UsageError,
        match=r"did you mean tinyworld-pope\? Choose one of: .*tinyworld-chair, .*tinyworld-pope",
    ):
        tasks.get("tinyworld-pop")


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_TASKS", dict(base._TASKS))
    with pytest.raises(ValueError, match="registered already"):
        tasks.register(tasks.TinyWorldPope)


@pytest.mark.parametrize("task", tasks.tasks(), ids=lambda task: task.name)
def test_metrics_and_columns_agree(task: tasks.Task) -> None:
    names = [metric.name for metric in task.metrics]
    assert len(names) == len(set(names))
    assert set(task.macro) <= set(names)
    for metric in task.metrics:
        assert metric.outcome is None or metric.outcome in task.columns
    assert any(metric.headline for metric in task.metrics)
    assert task.flavour(None) == task.flavours[0]


def test_pope_asks_six_questions_per_image_and_split() -> None:
    task = tasks.get("tinyworld-pope")
    documents = task.documents("test", 6, 0)
    assert len(documents) == 6 * 6 * 3
    assert [d.split for d in documents] == [s for s in ("random", "popular", "adversarial") for _ in range(36)]
    assert len({d.doc_id for d in documents}) == len(documents)
    for document in documents:
        scene = tinyworld.scene(*tinyworld.image_index(document.image))
        asked = next(
            name for name in sorted(tinyworld_names(), key=len, reverse=True) if f" {name} " in document.prompt
        )
        assert document.target["label"] == ("yes" if asked in scene.categories else "no")


def test_too_few_pictures_for_pope_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 TinyWorld pictures are too few for POPE .* raise --limit"):
        tasks.get("tinyworld-pope").documents("test", 1, 0)


def tinyworld_names() -> tuple[str, ...]:
    from mmfix_evals.tinyworld import world

    return world.CATEGORIES


def test_both_tasks_show_the_same_pictures_and_a_limit_takes_the_first() -> None:
    pope, chair_task = tasks.get("tinyworld-pope"), tasks.get("tinyworld-chair")
    images = [d.image for d in chair_task.documents("dev", 8, 2)]
    assert set(images) == {d.image for d in pope.documents("dev", 8, 2)}
    assert images[:5] == [d.image for d in chair_task.documents("dev", 5, 2)]
    assert [tinyworld.image_index(name) for name in images] == [("dev", i, 2) for i in range(8)]


def test_chair_ground_truth_holds_what_is_drawn_and_never_what_is_merely_expected() -> None:
    for document in tasks.get("tinyworld-chair").documents("test", 20, 0):
        scene = tinyworld.scene(*tinyworld.image_index(document.image))
        truth, expected = set(document.target["ground_truth"]), set(document.target["expected"])
        assert set(scene.categories) <= truth
        assert expected
        assert not truth & expected
        assert expected <= set(tinyworld.expected_absent(scene))
        assert truth <= set(chair.Chair().nodes.values())
        assert document.prompt == tinyworld.CAPTION_PROMPT


def test_an_invented_partner_counts_as_expected_by_the_prior() -> None:
    task = tasks.get("tinyworld-chair")
    document = next(d for d in task.documents("test", 50, 0) if d.target["expected"])
    present, partner = document.target["ground_truth"][0], document.target["expected"][0]
    stranger = next(
        name
        for name in tinyworld_names()
        if name not in document.target["ground_truth"] and name not in document.target["expected"]
    )
    counts = task.counts(
        {**document.target, "response": f"There is a {present} and a {partner} and a {stranger} and a {partner}."},
        "pattern",
    )
    assert (counts["mentions"], counts["hallucinated_mentions"]) == (4, 3)
    assert (counts["hallucinated_objects"], counts["expected_hallucinated_objects"]) == (2, 1)


def test_pictures_are_hashed_by_their_pixels() -> None:
    task = tasks.get("tinyworld-chair")
    names = [d.image for d in task.documents("test", 2, 0)]
    first, second = map(task.image_sha256, names)
    assert first != second
    assert first == tasks.get("tinyworld-pope").image_sha256(names[0])
    assert task.image(names[0]).mode == "RGB"


def test_tasks_import_no_torch() -> None:
    code = "import sys, mmfix_evals.tasks; assert not {'torch', 'transformers', 'mmfix'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
