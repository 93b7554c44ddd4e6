"""TinyWorld as benchmark data: POPE questions in the official format, COCO files, a contact sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmfix_evals.pope_build import Scene as PopeScene
from mmfix_evals.pope_build import questions_about
from mmfix_evals.tinyworld.draw import render
from mmfix_evals.tinyworld.text import references
from mmfix_evals.tinyworld.world import CATEGORIES, SIZE, Scene, file_name, scene, stream


def scenes(split: str, images: int, world_seed: int = 0) -> list[Scene]:
    """The first `images` scenes of a split."""
    return [scene(split, index, world_seed) for index in range(images)]


def pope_questions(split: str, images: int, world_seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """POPE questions about the first `images` pictures: six per picture and split, by the official rules.

    Returns:
        ``random``, ``popular`` and ``adversarial`` → rows ``{"question_id", "image", "text", "label"}``.
    """
    pictures = [
        PopeScene(file_name(split, item.image_id, world_seed), item.categories)
        for item in scenes(split, images, world_seed)
    ]
    built = questions_about(pictures, 3, stream("pope", world_seed, split, images))
    return {kind: [dict(row) for row in rows] for kind, rows in built.splits.items()}


def write_world(folder: Path | str, split: str, images: int, world_seed: int = 0) -> None:
    """Write pictures, COCO instances and captions, POPE files and a contact sheet into `folder`."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    items = scenes(split, images, world_seed)
    for item in items:
        render(item).save(folder / "images" / file_name(split, item.image_id, world_seed))
    _write_json(folder / "instances.json", coco_instances(items))
    _write_json(folder / "captions.json", coco_captions(items))
    for kind, rows in pope_questions(split, images, world_seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"pope_{kind}.json").write_text(lines)
    contact_sheet(items[:40]).save(folder / "contact_sheet.png")


def _coco_images(items: list[Scene]) -> list[dict[str, Any]]:
    return [
        {
            "id": item.image_id,
            "file_name": file_name(item.split, item.image_id, item.world_seed),
            "width": SIZE,
            "height": SIZE,
        }
        for item in items
    ]


def coco_instances(items: list[Scene]) -> dict[str, Any]:
    """Instances in COCO's layout; boxes are ``[x, y, width, height]`` in pixels."""
    numbers = {name: n for n, name in enumerate(CATEGORIES, start=1)}
    annotations = []
    for item in items:
        for placed in item.objects:
            x, y, w, h = placed.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": item.image_id,
                    "category_id": numbers[placed.category],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": n, "name": name, "supercategory": "object"} for name, n in numbers.items()]
    return {"info": _INFO, "images": _coco_images(items), "annotations": annotations, "categories": categories}


def coco_captions(items: list[Scene]) -> dict[str, Any]:
    """Truthful captions in COCO's layout."""
    rows = [(item.image_id, text) for item in items for text in references(item)]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(rows, start=1)]
    return {"info": _INFO, "images": _coco_images(items), "annotations": annotations}


_INFO = {"description": "TinyWorld, a synthetic world", "version": "1"}


def contact_sheet(items: list[Scene], columns: int = 8) -> Image.Image:
    """Pictures in a grid with what is in them, far objects marked."""
    cell_w, cell_h = 2 * SIZE + 8, 2 * SIZE + 44
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for n, item in enumerate(items):
        x, y = n % columns * cell_w + 4, n // columns * cell_h + 4
        sheet.paste(render(item).resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + 2 * SIZE + 2), f"{item.scene} {item.image_id}", fill="black")
        names = [o.category + ("" if o.near else " (far)") for o in item.objects]
        pen.text((x, y + 2 * SIZE + 14), ", ".join(names[:3]), fill="black")
        pen.text((x, y + 2 * SIZE + 26), ", ".join(names[3:]), fill="black")
    return sheet


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
