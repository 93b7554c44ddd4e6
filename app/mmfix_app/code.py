"""The Python and the command line that do what the page shows."""

from __future__ import annotations

import json
from shlex import quote
from typing import Any

import mmfix
from mmfix import Method
from mmfix_app.markup import esc
from mmfix_app.service import Decoding


def python(model: str, method: str, changed: dict[str, Any], prompt: str, decoding: Decoding) -> str:
    """A script that gives the mitigated answer: the exact ``mitigate(...)`` call."""
    arguments = "".join(f", {name}={value!r}" for name, value in changed.items())
    told = ", processor=processor" if mmfix.methods()[method].cls.mask is not Method.mask else ""
    options = [f"max_new_tokens={decoding.max_new_tokens}", *(f"{k}={v!r}" for k, v in decoding.kwargs.items())]
    if not decoding.sample:
        return (
            "import mmfix\nfrom mmfix_decoding import Decoder, load_image\n\n"
            f"decoder = Decoder.from_pretrained({model!r})\n"
            "model, processor = decoder.model, decoder.processor\n"
            "picture = load_image('picture.png')\n"
            f"turn = [{{'type': 'image', 'image': picture}}, {{'type': 'text', 'text': {prompt!r}}}]\n"
            "inputs = processor.apply_chat_template(\n"
            "    [{'role': 'user', 'content': turn}], add_generation_prompt=True,\n"
            "    tokenize=True, return_dict=True, return_tensors='pt',\n"
            ").to(model.device, dtype=model.dtype)\n\n"
            f"with mmfix.mitigate(model, {method!r}{told}{arguments}):\n"
            f"    ids = model.generate(**inputs, {', '.join(options)})\n"
            "print(processor.decode(ids[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True))\n"
        )
    chosen = f"mmfix.calibrated(plain.model, {method!r}{arguments})"
    return (
        "import mmfix\nfrom mmfix_decoding import Decoder\n\n"
        f"plain = Decoder.from_pretrained({model!r})\n"
        f"decoder = plain.with_method({chosen})  # mitigate() around generate(), with draws that a seed settles\n"
        f"print(decoder.generate('picture.png', {prompt!r}, seed={decoding.seed}, {', '.join(options)}))\n"
    )


def command(model: str, method: str, changed: dict[str, Any], prompt: str, decoding: Decoding) -> str:
    """The same on the command line, beside the plain answer."""
    values = ",".join(f"{name}={_plain(value)}" for name, value in changed.items())
    parts = [
        "mmfix",
        "describe",
        "picture.png",
        "--model",
        model,
        "--method",
        f"{method}:{values}" if values else method,
    ]
    parts += ["--prompt", prompt, "--max-new-tokens", str(decoding.max_new_tokens)]
    if decoding.sample:
        drawn = ",".join(f"{name}={_plain(value)}" for name, value in decoding.kwargs.items())
        parts += ["--seed", str(decoding.seed), "--gen-kwargs", drawn]
    return " ".join(quote(part) for part in parts)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":"))


def render(model: str, method: str, changed: dict[str, Any], prompt: str, decoding: Decoding) -> str:
    """Both, each with a button that copies it."""
    given = (model, method, changed, prompt, decoding)
    blocks = (("Python", python(*given)), ("Command line", command(*given)))
    return '<p class="mm-note">Save the picture as <code>picture.png</code> where you run it.</p>' + "".join(
        f'<div class="code"><div class="top"><h4>{title}</h4><button type="button" class="copy" '
        f'aria-label="Copy: {title}">Copy</button></div><pre tabindex="0">{esc(text)}</pre></div>'
        for title, text in blocks
    )
