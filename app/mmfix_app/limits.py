"""Every cap of the app in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Args:
        upload_bytes: size of an uploaded picture.
        pixels: width × height, checked on the header before a pixel is decoded.
        prompt_characters: length of a prompt.
        tokens: new tokens per answer.
        seconds: time that one run may hold the model.
        waiting: visitors in the queue before the app says it is full.
        sweep_points: values of one sweep.
        keep_seconds: age at which temporary files are removed; longer than the longest wait in the queue.
        look_seconds: how often is looked for them.
    """

    upload_bytes: int = 10 * 1024 * 1024
    pixels: int = 40_000_000
    prompt_characters: int = 500
    tokens: int = 128
    seconds: float = 60.0
    waiting: int = 24
    sweep_points: int = 21
    keep_seconds: int = 1800
    look_seconds: int = 60


FORMATS = ("PNG", "JPEG", "WEBP")
"""Picture formats that are accepted, by content and not by name."""
