"""``mmfix eval build``: question files made from annotations. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.errors import UsageError

EXAMPLE = "Example: mmfix eval build pope --coco annotations/ --images 500 --seed 0 --out pope/coco"

app = typer.Typer(help="Build the questions of a benchmark from annotations.", epilog=EXAMPLE, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Build the questions of a benchmark from annotations."""


@app.command("pope", epilog=EXAMPLE)
def pope_command(
    out: Annotated[Path, typer.Option(help="Folder for the question files.")],
    segmentation: Annotated[
        Path | None,
        typer.Option(help='JSON Lines of {"image": name, "objects": [names]}.'),
    ] = None,
    coco: Annotated[Path | None, typer.Option(help="Folder of COCO's instances_*.json and captions_*.json.")] = None,
    split: Annotated[str, typer.Option(help="With --coco: the split of the annotation files.")] = "val2014",
    images: Annotated[int, typer.Option(help="Images to draw.")] = 500,
    pairs: Annotated[int, typer.Option(help="Yes questions (and no questions) per image and split.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the one stream of random numbers.")] = 0,
    name: Annotated[str, typer.Option(help="First part of the file names.")] = "coco",
    compat_imange: Annotated[
        bool, typer.Option("--compat-imange", help='The official text byte for byte, with its "imange".')
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Random, popular and adversarial questions, draw for draw as the official builder makes them.

    The same seed gives the same files as the official code after `random.seed(SEED)`; there the text says "imange"
    where an object begins with a vowel (--compat-imange).
    """
    from mmfix_evals import files, pope_build

    if (segmentation is None) == (coco is None):
        raise UsageError("give either --segmentation FILE or --coco FOLDER")
    if segmentation is not None:
        scenes, sources = pope_build.read_scenes(segmentation), [segmentation]
    else:
        from mmfix_evals.coco_scenes import annotation_pair, scenes_from_coco

        assert coco is not None
        scenes, sources = scenes_from_coco(coco, split), list(annotation_pair(coco, split))
    built = pope_build.build(scenes, images, pairs, seed, compat_imange=compat_imange)
    written = {}
    for kind, rows in built.splits.items():
        path = out / f"{name}_pope_{kind}.json"
        files.write_text_atomic(path, pope_build.to_json_lines(rows))
        written[path.name] = files.sha256(path)
    record = {
        "images": images,
        "pairs": pairs,
        "seed": seed,
        "compat_imange": compat_imange,
        "sources": {path.name: files.sha256(path) for path in sources},
        "files": written,
        "image_ids": [scene.image for scene in built.selected],
        "ground_truth_objects": dict(built.counts),
        "co_occurrence": {one: list(others) for one, others in built.co_occurrence.items()},
    }
    files.write_text_atomic(out / f"{name}_pope_build.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        typer.echo(json.dumps({"out": str(out), **{k: record[k] for k in ("seed", "sources", "files")}}, indent=1))
        return
    for file, digest in written.items():
        typer.echo(f"{out / file}  {2 * pairs * images} questions  sha256 {digest}")
    typer.echo(f"Next: mmfix eval score pope --questions {out / f'{name}_pope_random.json'} --answers ANSWERS")
