"""The small LLaVA saved to a folder and loaded as any folder is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_llava import make_model, make_processor, picture

from mmfix_decoding import Decoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint in bfloat16, as models are published."""
    path = tmp_path_factory.mktemp("model")
    make_model().to(torch.bfloat16).save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def decoder(folder: Path) -> Decoder:
    """The plain decoder on that folder; do not change it."""
    return Decoder.from_pretrained(folder)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Five different pictures of different sizes."""
    return [picture(seed, (24 + 7 * seed, 30)) for seed in range(5)]


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Five prompts of different lengths."""
    return [
        "is there a cat ?",
        "describe this image please",
        "is there a dog and a cup and a cat in the picture ?",
        "dog ?",
        "please describe the cup , the dog and the two cat picture in this image .",
    ]
