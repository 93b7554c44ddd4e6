"""``mmfix bench scoring``: how long scoring takes. Imports no torch.

CHAIR on 2,000 captions with cached ground truth should take under 2 s, POPE on 9,000 answers under 0.5 s. Times are
measured and recorded here, never asserted in a test. The input is made up, the same everywhere: captions of about 90
words in the manner of a large model's, ground truth in COCO's layout, questions and answers in POPE's.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mmfix_evals.errors import UsageError

EXAMPLE = "Example: mmfix bench scoring --repeats 5 --json"
CAPTIONS, ANSWERS = 2000, 9000
TARGETS = {"chair": 2.0, "pope": 0.5}
"""Seconds of processor time, the median; wall time is the same on a machine that has nothing else to do."""

_SENTENCES = (
    "The image shows {a} and {b} in front of a large building.",
    "In the background, there are several {c}s, some closer to the camera and others further away.",
    "A person is standing next to the {a}, possibly waiting for someone.",
    "There is also a {b} placed on the left side of the scene, while another {c} can be seen on the right.",
    "The overall atmosphere is calm, and the {a} adds a sense of everyday life to the scene.",
    "Additionally, two {c}s are visible near the {b}; one of them isn't fully in view.",
)
_ANSWERS = ("Yes", "No", "Yes, there is.", "No, there isn't a {a} in the image.", "I can't tell.", "yes.")


def captions(count: int = CAPTIONS, seed: int = 0) -> list[dict[str, Any]]:
    """``{"image_id", "caption"}`` rows."""
    from mmfix_evals.metrics.coco_words import CATEGORIES

    draw, names = random.Random(seed), list(CATEGORIES)
    return [
        {
            "image_id": n,
            "caption": " ".join(
                sentence.format(**dict(zip("abc", draw.sample(names, 3), strict=True)))
                for sentence in draw.sample(_SENTENCES, 5)
            ),
        }
        for n in range(count)
    ]


def annotations(folder: Path, count: int = CAPTIONS, seed: int = 0) -> None:
    """COCO's two annotation files for the pictures of :func:`captions`."""
    from mmfix_evals.metrics.coco_words import CATEGORIES

    draw, names = random.Random(seed), list(CATEGORIES)
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(count)]
    objects = [
        {"id": 8 * n + k, "image_id": n, "category_id": draw.randrange(len(names)), "iscrowd": 0}
        for n in range(count)
        for k in range(8)
    ]
    texts = [
        {"id": 5 * n + k, "image_id": n, "caption": f"A {draw.choice(names)} next to a {draw.choice(names)}."}
        for n in range(count)
        for k in range(5)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    instances = {"images": images, "annotations": objects, "categories": categories}
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": texts}))


def questions(count: int = ANSWERS, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Question and answer rows of three splits in one file."""
    draw = random.Random(seed)
    splits = ("random", "popular", "adversarial")
    asked, given = [], []
    for n in range(count):
        label = ("yes", "no")[n % 2]
        asked.append({"question_id": n, "image": f"{n // 18}.jpg", "text": "Is there a cat in the image?",
                      "label": label, "category": splits[3 * n // count]})  # fmt: skip
        given.append({"question_id": n, "answer": draw.choice(_ANSWERS).format(a="cat")})
    return asked, given


def measure(repeats: int) -> dict[str, Any]:
    """Seconds of every repeat, from files on disk to the score, with what they were measured on."""
    from mmfix_evals import machine
    from mmfix_evals.metrics import chair, chair_text, pope

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, (asked, given) = captions(), questions()
        paths = {part: folder / f"{part}.jsonl" for part in ("captions", "questions", "answers")}
        for part, listed in zip(paths, (rows, asked, given), strict=True):
            paths[part].write_text("".join(json.dumps(row) + "\n" for row in listed))
        annotations(folder)
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # an empty cache, and the user's untouched
        start = time.process_time()
        chair.read_ground_truth(folder, chair.Chair())
        first = time.process_time() - start

        def score_chair() -> None:
            chair_text.words.cache_clear()
            chair_text.singular.cache_clear()
            chair.score_files(paths["captions"], folder)

        found = {
            "chair": _times(score_chair, repeats),
            "pope": _times(lambda: pope.score_files(paths["questions"], paths["answers"]), repeats),
        }
        os.environ.pop("XDG_CACHE_HOME")
        os.environ.update({} if before is None else {"XDG_CACHE_HOME": before})
    words = statistics.mean(len(row["caption"].split()) for row in rows)
    relevant = ("python", "mmfix", "numpy", "nltk", "textblob")
    return {
        "schema_version": 1,
        "input": {"captions": CAPTIONS, "words_per_caption": round(words, 1), "answers": ANSWERS, "seed": 0},
        "seconds": found,
        "target_processor_seconds": TARGETS,
        "ground_truth_first_time": first,
        "cache": "JSON keyed by the sha256 of annotation files, words and flavour",
        "machine": {"cpu": machine.cpu_model(), "cores": machine.cores(), "load_average": _load()},
        "versions": {name: version for name, version in machine.versions().items() if name in relevant},
        "git": machine.git(),
    }


def _load() -> float | None:
    """Processes that wanted to run during the last minute: far above the number of cores, wall times mean nothing."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _times(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Processor time (scoring uses one core) and wall time of every repeat, and the medians."""
    work()  # imports and the operating system's cache
    processor, wall = [], []
    for _ in range(repeats):
        start, clock = time.process_time(), time.perf_counter()
        work()
        processor.append(time.process_time() - start)
        wall.append(time.perf_counter() - clock)
    return {
        "processor": processor,
        "wall": wall,
        "median_processor": statistics.median(processor),
        "median_wall": statistics.median(wall),
    }


def scoring_command(
    repeats: Annotated[int, typer.Option(help="Timed repeats after one untimed; the median is reported.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the scorers on made-up input: CHAIR on 2,000 captions, POPE on 9,000 answers."""
    from mmfix_evals import files

    if repeats < 1:
        raise UsageError(f"--repeats {repeats}: give a number of 1 or more")
    found = measure(repeats)
    if out is not None:
        files.write_text_atomic(out, json.dumps(found, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, count in (("chair", f"{CAPTIONS} captions"), ("pope", f"{ANSWERS} answers")):
        times = found["seconds"][name]
        typer.echo(
            f"{name:<6} {count:<14} median {times['median_processor']:.3f} s processor, {times['median_wall']:.3f} s "
            f"wall ({repeats} repeats; target {TARGETS[name]:g} s)"
        )
    typer.echo(f"ground truth the first time, before it is cached: {found['ground_truth_first_time']:.2f} s")


if __name__ == "__main__":
    typer.run(scoring_command)
