"""Pictures of the tiny families in model-input form, and the tokens that stand for them in a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VOCABULARY = 100
IMAGE_ID, VIDEO_ID, START_ID, END_ID, BREAK_ID = 99, 98, 97, 96, 95

Inputs = dict[str, Tensor]


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def run(count: int) -> Callable[[int], list[int]]:
    return lambda number: [IMAGE_ID] * count


def flat(numbers: list[list[int]]) -> list[int]:
    return [n for row in numbers for n in row]


def whole(size: int) -> Callable[[list[list[int]]], Inputs]:
    """Square pictures stacked."""
    return lambda rows: {"pixel_values": torch.cat([pixels(1, 3, size, size, seed=n) for n in flat(rows)])}


def by_prompt(size: int) -> Callable[[list[list[int]]], Inputs]:
    """[prompts, pictures, 3, size, size], filled up with black pictures."""

    def pictures(rows: list[list[int]]) -> Inputs:
        out = torch.zeros(len(rows), max(map(len, rows)), 3, size, size)
        for i, row in enumerate(rows):
            for j, n in enumerate(row):
                out[i, j] = pixels(3, size, size, seed=n)
        return {"pixel_values": out}

    return pictures


# Sizes of pictures 0, 1, 2, … in pixels (height, width), where a family takes any size.
_SIZES = ((32, 48), (32, 32), (16, 48))


def size(number: int) -> tuple[int, int]:
    return _SIZES[number % len(_SIZES)]


def padded_pixels(rows: list[list[int]]) -> Inputs:
    """Pictures of their own sizes in one zero-padded stack, with image_sizes."""
    numbers = flat(rows)
    sizes = [size(n) for n in numbers]
    out = torch.zeros(len(numbers), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    for i, (n, (h, w)) in enumerate(zip(numbers, sizes, strict=True)):
        out[i, :, :h, :w] = pixels(3, h, w, seed=n)
    return {"pixel_values": out, "image_sizes": torch.tensor(sizes)}


def tiles(rows: list[list[int]]) -> Inputs:
    """An overview and two tiles per picture; even pictures lie, odd ones stand."""
    numbers = flat(rows)
    sizes = torch.tensor([[24, 48] if n % 2 == 0 else [48, 24] for n in numbers])
    return {"pixel_values": torch.stack([pixels(3, 3, 24, 24, seed=n) for n in numbers]), "image_sizes": sizes}


def tile_span(number: int) -> list[int]:
    """9 tokens of the overview, then rows of patches that each end in a newline slot (an image token too)."""
    high, wide = (3, 6) if number % 2 == 0 else (6, 3)
    return [IMAGE_ID] * (9 + high * (wide + 1))


# Patch grids (time, height, width) of pictures 0, 1, …; four patches make one token.
_GRIDS = ((1, 4, 6), (1, 8, 4), (1, 4, 4))


def grid(rows: list[list[int]]) -> Inputs:
    grids = torch.tensor([_GRIDS[n % len(_GRIDS)] for n in flat(rows)])
    parts = [pixels(int(grid.prod()), 3 * 2 * 8 * 8, seed=n) for n, grid in zip(flat(rows), grids, strict=True)]
    return {"pixel_values": torch.cat(parts), "image_grid_thw": grids}


def grid_span(number: int) -> list[int]:
    t, h, w = _GRIDS[number % len(_GRIDS)]
    return [START_ID, *[IMAGE_ID] * (t * h * w // 4), END_ID]


def two_tiles(number: int) -> list[int]:
    """Two tiles of four tokens, each after a marker that is text."""
    return [BREAK_ID, *[IMAGE_ID] * 4, BREAK_ID, *[IMAGE_ID] * 4]


def two_per_picture(rows: list[list[int]]) -> Inputs:
    return by_prompt(32)([[tile for n in row for tile in (2 * n, 2 * n + 1)] for row in rows])


def patch_rows(side: int) -> Callable[[int], list[int]]:
    """A break after each row of patches, which is text."""

    def span(number: int) -> list[int]:
        high, wide = (pixel // side for pixel in size(number))
        return ([IMAGE_ID] * wide + [BREAK_ID]) * high

    return span


def questions(rows: list[list[int]]) -> Inputs:
    """Pictures, and the question that InstructBLIP gives its Q-Former."""
    ids = torch.stack([(pixels(5, seed=n) * 7).long().abs() + 5 for n in flat(rows)])
    return {**whole(16)(rows), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def four_tiles(rows: list[list[int]]) -> Inputs:
    """Pictures of up to four tiles: even ones are two tiles wide, odd ones have one tile."""
    ids = torch.tensor([[2 if n % 2 == 0 else 1 for n in row] for row in rows])
    mask = torch.tensor([[[1, int(n % 2 == 0), 0, 0] for n in row] for row in rows])
    values = torch.stack([torch.stack([pixels(4, 3, 16, 16, seed=n) for n in row]) for row in rows])
    return {
        "pixel_values": values * mask[..., None, None, None], "aspect_ratio_ids": ids, "aspect_ratio_mask": mask,
    }  # fmt: skip


def seen_tiles(inputs: Inputs) -> Inputs:
    """cross_attention_mask: tokens from a picture's placeholder on see its tiles."""
    after = (inputs["input_ids"] == IMAGE_ID).cumsum(-1) > 0
    mask = after[:, :, None, None] & inputs["aspect_ratio_mask"].bool()[:, None]
    return {"cross_attention_mask": mask.long()}
