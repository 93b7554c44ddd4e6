"""``mmfix calibrate vti``: steering directions from pictures and pairs of captions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfix_evals.cli import calibrate, options, targets
from mmfix_evals.cli.calibrate_common import begin, load, positive
from mmfix_evals.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Pair = tuple["Image", str, str]  # a picture, what is true of it, and what is not


@calibrate.app.command("vti", epilog="Example: mmfix calibrate vti --model tiny --limit 32 --trials 10")
def vti_command(
    model: options.Model = "tiny",
    images: options.Pictures = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="JSON lines: image (a file of --images), truthful and invented (captions of it)."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Pictures, or pairs, to look at.")] = 50,
    trials: Annotated[int, typer.Option(help="Masked copies of each picture.")] = 50,
    mask: Annotated[float, typer.Option(help="Share of the patches that a copy loses.")] = 0.99,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    prompt: Annotated[str, typer.Option(help="Prompt beside every picture.")] = calibrate.PROMPT,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    save_to: Annotated[
        Path | None, typer.Option(help="Write mmfix-vti.safetensors into this model folder, not into the user's cache.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the directions along which `vti` steers a model, and keep them for it.

    Stopped and started again, it goes on where it was. While it runs it keeps the states of every patch of every
    picture in the user's cache: for LLaVA-1.5-7B 57 MB a picture.
    """
    positive(limit=limit, trials=trials)
    targets.folder("--save-to", save_to)
    if not 0 < mask < 1:
        raise UsageError(f"--mask {mask:g}: give a share between 0 and 1")
    if pairs is not None and images is None:
        raise UsageError("--pairs names pictures of a folder; give it with --images")
    from mmfix_evals import calibrating, headdata

    captioned = _tinyworld(limit) if images is None else [] if pairs is None else list(_read(pairs, images, limit))
    asked = [headdata.Asked(picture, prompt) for picture, _, _ in captioned]
    asked = asked or headdata.described(images, limit, prompt)
    from mmfix import directions
    from mmfix.families import describe
    from mmfix_evals.progress import Reporter

    decoder = load(model, device, dtype)
    family = describe(decoder.model)
    told = [headdata.Asked(picture, prompt, f"{good}\0{bad}") for picture, good, bad in captioned]
    facts: dict[str, Any] = {"trials": trials, "mask": mask, "seed": seed, "prompt": prompt}
    facts["data_sha256"] = headdata.digest(told or asked)
    text, count = None, 0
    with Reporter(quiet or as_json) as reporter, decoder.exclusive():
        parts = calibrating.parts("vti", decoder, facts, reporter.warn)
        what = "pairs and pictures" if captioned else "pictures"
        begin(reporter, "vti", len(captioned) + len(asked), what, len(parts))
        if captioned:
            pairs_of = ((_told(decoder, p, prompt, good), _told(decoder, p, prompt, bad)) for p, good, bad in captioned)
            text, count = directions.text_direction(family, pairs_of, reporter.advance, parts)
        looks = (inputs for inputs, _ in headdata.batches(decoder, asked, 1))
        vision = directions.vision_direction(family, looks, trials, mask, seed, reporter.advance, parts)
    data = f"TinyWorld {headdata.SPLIT}" if images is None else "own pictures"
    facts |= {**calibrating.identity(decoder), "pictures": len(asked), "pairs": count, "data": data}
    facts |= {"versions": _versions()}
    path = directions.save(decoder.model, directions.Directions(text, vision, facts), save_to)
    parts.done()
    shapes = {"text": None if text is None else list(text.shape), "vision": list(vision.shape)}
    if as_json:
        typer.echo(json.dumps({**facts, **shapes, "file": str(path)}, indent=1))
        return
    typer.echo(f"vision   {' x '.join(map(str, vision.shape))}, from {len(asked)} pictures, {trials} masks each")
    typer.echo(
        f"text     {' x '.join(map(str, text.shape))}, from {count} pairs of captions"
        if text is not None
        else "text     none: give --pairs to steer the language model too; until then use vti:alpha_text=0"
    )
    typer.echo(f"written to {path}")
    typer.echo(f"Next: mmfix describe PICTURE --model {model} --method vti{'' if captioned else ':alpha_text=0'}")


def _tinyworld(limit: int) -> list[Pair]:
    """Dev pictures with a true caption, and the same caption with one object swapped for an expected absent one."""
    from mmfix_evals import tinyworld
    from mmfix_evals.tinyworld import text, world

    found = []
    for index in range(limit):
        scene = tinyworld.scene("dev", index)
        absent = sorted(tinyworld.absent_partners(scene)) or sorted(tinyworld.expected_absent(scene))
        absent = absent or sorted(set(tinyworld.CATEGORIES) - set(scene.categories))
        swapped = dataclasses.replace(scene.objects[-1], category=absent[0])
        other = dataclasses.replace(scene, objects=(*scene.objects[:-1], swapped))
        captions = [text.caption(one, world.stream("vti", index), noisy=False) for one in (scene, other)]
        found.append((tinyworld.render(scene), captions[0], captions[1]))
    return found


def _read(path: Path, folder: Path, limit: int) -> Iterator[Pair]:
    """Pairs of captions as the user gives them."""
    from mmfix_decoding import load_image
    from mmfix_evals.files import read_rows

    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: holds no pair; give lines with image, truthful and invented")
    for index, row in enumerate(rows[:limit]):
        names = ("image", "truthful", "invented")
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in names):
            raise DataError(f"{rows.place(index)}: give image, truthful and invented, each a text")
        if not (folder / row["image"]).is_file():
            raise DataError(f"{rows.place(index)}: {folder / row['image']} is no file")
        yield load_image(folder / row["image"]), row["truthful"], row["invented"]


def _told(decoder: Any, picture: Image, prompt: str, answer: str) -> dict[str, Any]:
    """Inputs of one prompt followed by an answer."""
    import torch

    from mmfix_evals import headdata

    ((inputs, _),) = headdata.batches(decoder, [headdata.Asked(picture, prompt)], 1)
    length = inputs["input_ids"].shape[1]
    ids = decoder.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    new = ids.to(inputs["input_ids"].device)
    grown = dict(inputs)
    for name, value in inputs.items():
        if value.shape[:2] == (1, length):  # one entry per token: those of the answer are like the last one
            more = new if name == "input_ids" else value[:, -1:].expand(1, new.shape[1])
            grown[name] = torch.cat([value, more], dim=1)
    return grown


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import mmfix

    return {"mmfix": mmfix.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
