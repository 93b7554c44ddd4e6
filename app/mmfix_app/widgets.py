"""Pieces of the page that several tabs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mmfix_app import controls

ASSETS = Path(__file__).parent / "assets"
QUEUE = "model"
"""Everything that uses the model waits in one line."""
QUIET: dict[str, Any] = {"queue": False, "api_visibility": "private"}
"""For events that only change the page."""


def picture_input(value: str | None = None, **options: Any) -> gr.Image:
    """An image box that hands over the file's path: nothing decodes a visitor's file before it is checked."""
    found = gr.Image(value, sources=["upload", "clipboard"], format="png", buttons=[], **options)
    found.preprocess = lambda payload: None if payload is None else payload.path
    return found


def script(name: str) -> str:
    return (ASSETS / f"{name}.js").read_text(encoding="utf-8")


def html(value: str = "", **options: Any) -> gr.HTML:
    """Markup with the app's own styles only."""
    return gr.HTML(value, apply_default_css=False, **options)


def slot(name: str) -> gr.HTML:
    """A place for a message beside a control; takes no room while it is empty."""
    return html(elem_id=name, elem_classes="mm-slot")


def component(one: controls.Control) -> Any:
    """A control for a parameter."""
    options: dict[str, Any] = {"label": one.label, "info": one.help or None}
    if one.kind == "choice":
        return gr.Dropdown(list(one.choices), value=one.value, filterable=False, **options)
    if one.kind == "switch":
        return gr.Checkbox(one.value, **options)
    if one.kind in ("optional", "list", "words"):
        return gr.Textbox(one.value, max_length=200, **options)
    if one.slider:
        return gr.Slider(one.low, one.high, one.value, step=one.step, **options)
    return gr.Number(one.value, precision=0 if one.kind == "whole" else None, **options)
