"""What methods must be told of a model, found on TinyWorld's dev split or the user's pictures, not on test data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mmfix
from mmfix import headscores
from mmfix.methods import ACT, SoFA
from mmfix.parts import Parts
from mmfix_evals import files, headdata
from mmfix_evals.errors import DataError
from mmfix_evals.fingerprint import fingerprint
from mmfix_evals.headdata import SPLIT, Asked

Progress = Callable[[int], None]
WORDS = ("yes", "no")


@dataclass(frozen=True)
class Found:
    """Values for a method, and how they were found."""

    values: dict[str, Any]
    record: dict[str, Any]
    plain: dict[str, float] = field(default_factory=dict)


class Partial:
    """Results of an interrupted calibration, one JSON line per setting tried.

    Args:
        name: of the method.
        key: whatever decides the results; another key is another file.
    """

    def __init__(self, name: str, key: dict[str, Any]) -> None:
        self.path = _unfinished(name, key).with_suffix(".partial.jsonl")
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.rows[row["setting"]] = row
                except (ValueError, KeyError, TypeError):
                    continue  # the line that was being written when the work stopped

    def get(self, setting: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a setting: as found in the file, else computed and written down."""
        if setting not in self.rows:
            row = {"setting": setting, **compute()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            self.rows[setting] = row
        return self.rows[setting]

    def done(self) -> None:
        """The calibration is complete: nothing is left to resume."""
        self.path.unlink(missing_ok=True)


def parts(name: str, decoder: Any, key: dict[str, Any], say: Callable[[str], None]) -> Parts:
    """Where a calibration that keeps tensors leaves what it has found, in the place of :class:`Partial`.

    Args:
        key: whatever decides the results, beside the model, its precision and this version.
        say: told which of the parts found cannot be used.
    """
    full = {**identity(decoder), "dtype": str(decoder.model.dtype), "mmfix": mmfix.__version__, **key}
    return Parts(_unfinished(name, full).with_suffix(".partial"), full, say)


def _unfinished(name: str, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return files.cache_dir() / "calibration" / f"{name}-{digest[:16]}"


def identity(decoder: Any) -> dict[str, Any]:
    """Model and revision, as they stand in a calibration."""
    known = fingerprint(decoder)
    return {"model_id": known["id"], "revision": known["revision"] or known["sha256"]}


def candidates(decoder: Any) -> list[tuple[int, int]]:
    """Heads that ACT may calibrate: all of the layers from 2 to the last but one."""
    family = mmfix.describe(decoder.model)
    return [(layer, head) for layer in range(2, family.num_layers - 1) for head in range(family.num_heads)]


def act(
    decoder: Any,
    asked: Sequence[Asked],
    options: dict[str, Any],
    progress: Progress = lambda done: None,
    batch_size: int = 8,
) -> Found:
    """Heads whose calibration alone answers more questions rightly, as ACT's paper chooses them.

    Args:
        asked: questions with answers.
        options: further parameters of ACT, which the calibration is made for and keeps.
        progress: told the settings done.

    Raises:
        DataError: no questions.
        MethodError: options that ACT does not take.
        MmfixError: the model has too few layers.
    """
    if not asked:
        raise DataError("no questions to calibrate on; give at least one")
    heads = candidates(decoder)
    if not heads:
        raise DataError("the model has fewer than four layers, and ACT leaves the first two and the last alone")
    ACT(heads="all", **options)
    tokenizer = decoder.processor.tokenizer
    known = {answer: headdata.beginnings(tokenizer, answer) for answer in {one.answer for one in asked}}
    made = [
        (inputs, [known[one.answer] for one in part]) for inputs, part in headdata.batches(decoder, asked, batch_size)
    ]
    data = headdata.digest(asked)
    partial = Partial("act", {**identity(decoder), "data": data, "options": options})

    def tried(setting: str, method: Any) -> dict[str, Any]:
        row = partial.get(setting, lambda: _answers(decoder.model, made, method))
        progress(1)
        return row

    with decoder.exclusive():
        plain = tried("plain", None)
        rows = {head: tried("{},{}".format(*head), ACT(heads=(head,), **options)) for head in heads}
        chosen = [head for head, row in rows.items() if row["right"] > plain["right"]]
        together = tried(f"chosen {chosen}", ACT(heads=tuple(chosen), **options) if chosen else None)
    partial.done()
    gains = {f"{layer},{head}": (row["right"] - plain["right"]) / len(asked) for (layer, head), row in rows.items()}
    record = {
        **identity(decoder), "data_sha256": data, "questions": len(asked),
        "fired": sum(row["fired"] for row in rows.values()),
        "scores": {"plain": plain["right"] / len(asked), "chosen": together["right"] / len(asked), "gain": gains},
    }  # fmt: skip
    return Found({"heads": [list(head) for head in chosen], **options}, record)


def _answers(model: Any, made: Sequence[tuple[dict[str, Any], Sequence[Sequence[int]]]], method: Any) -> dict[str, Any]:
    """How many first tokens are right, the mean probability of the right one, and how many rows were changed."""
    right, sure, count = 0, 0.0, 0
    with mmfix.mitigate(model, method) as fix:
        for inputs, answers in made:
            p = headscores.first_token(model, inputs)
            for row, ids in enumerate(answers):
                right += int(p[row].argmax()) in ids
                sure += float(p[row, list(ids)].sum())
                count += 1
    return {"right": right, "p_right": sure / count, "fired": sum(one.fired for one in fix.report().fired.values())}


def grid(step: float) -> list[float]:
    """0, step, … 1."""
    count = round(1 / step)
    return [round(n / count, 6) for n in range(count + 1)]


def sofa(
    decoder: Any,
    limit: int,
    sigmas: Sequence[float],
    layers: str = "even",
    progress: Progress = lambda done: None,
    batch_size: int = 8,
    own: Sequence[headdata.Pair] | None = None,
) -> Found:
    """SoFA's sigma with the most right answers about two pictures in either order.

    Of equal ones the most consistent wins, then the smallest. Accuracy and permutation consistency of every sigma are
    kept; the questions are those of the task ``tinyworld-position``, on the dev split, or the user's own.

    Args:
        limit: pictures of TinyWorld's dev split; two make a pair.
        sigmas: values that are tried.
        layers: SoFA's layers.
        own: questions in both orders one after the other, as of :func:`mmfix_evals.headdata.pair_questions`.
    """
    asked = _position_questions(limit) if own is None else own
    tokenizer = decoder.processor.tokenizer
    words = [list(headdata.beginnings(tokenizer, word)) for word in WORDS]
    total = hashlib.sha256()
    for pictures, prompt, label in asked:
        total.update(headdata.digest([Asked(picture, prompt, label) for picture in pictures]).encode())
    data = total.hexdigest()
    partial = Partial("sofa", {**identity(decoder), "data": data, "layers": layers})
    made = list(_pairs(decoder, asked, batch_size))

    def verdicts(sigma: float) -> dict[str, Any]:
        said: list[bool] = []
        with mmfix.mitigate(decoder.model, SoFA(sigma=sigma, layers=layers)) as fix:  # type: ignore[arg-type]
            for inputs in made:
                p = headscores.first_token(decoder.model, inputs)
                said += (p[:, words[0]].sum(-1) > p[:, words[1]].sum(-1)).tolist()
        right = [yes == (label == "yes") for yes, (_, _, label) in zip(said, asked, strict=True)]
        pairs = list(zip(said[::2], said[1::2], strict=True))
        return {
            "accuracy": sum(right) / len(right),
            "consistency": sum(a == b for a, b in pairs) / len(pairs),
            "pairs": len(pairs),
            "fired": fix.report().fired["sofa"].fired,
        }

    rows = []
    with decoder.exclusive(), torch.no_grad():
        for sigma in sigmas:
            rows.append({"sigma": sigma, **partial.get(f"{sigma:g}", lambda sigma=sigma: verdicts(sigma))})
            progress(1)
    partial.done()
    best = max(rows, key=lambda row: (row["accuracy"], row["consistency"], -row["sigma"]))
    scores = [{name: row[name] for name in ("sigma", "accuracy", "consistency", "pairs", "fired")} for row in rows]
    place = f"TinyWorld {SPLIT}" if own is None else "own pictures"
    record = {**identity(decoder), "data": place, "data_sha256": data, "scores": scores}
    return Found({"sigma": best["sigma"], "layers": layers}, record, rows[0])


def _position_questions(limit: int) -> list[headdata.Pair]:
    from mmfix_evals import tasks

    task = tasks.get("tinyworld-position")
    return [(task.show(one), one.prompt, str(one.target["label"])) for one in task.documents(SPLIT, limit, 0)]


def _pairs(decoder: Any, asked: Sequence[tuple[Any, str, str]], size: int) -> Any:
    """Batches of prompts with two pictures each."""
    from mmfix_decoding import prompts

    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        requests, _ = prompts.pair([pictures for pictures, _, _ in part], [prompt for _, prompt, _ in part])
        yield prompts.encode(prompts.load_images(requests), decoder.processor, decoder.model)


def act_questions(images: Path | None, questions: Path | None, limit: int) -> tuple[list[Asked], str]:
    """Questions for :func:`act`, and what to call them."""
    asked = headdata.questions(images, questions, limit)
    return asked, f"TinyWorld {SPLIT}" if images is None else "own pictures"
