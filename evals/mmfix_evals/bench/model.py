"""A LLaVA-1.5 of random weights, its prompts, and the ways to generate with it that are compared."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmfix_evals.errors import UsageError

IMAGE_ID = 5
IMAGE_TOKENS = 576
SYSTEM_TOKENS = 35
VANILLA, EMPTY, EAGER, SEQUENTIAL = "vanilla", "empty", "eager-maps", "sequential"
STATIC = "static/"  # before another arm: a cache of fixed size
# VAR's gate set open, so that its edit acts on random weights too.
OPEN_VAR = "var:sink_dims=[0,1],tau=2,min_image_mass=0,max_sink_share=1"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the vision tower gives 576 tokens in any case."""

    layers: int = 8
    width: int = 512
    dtype: torch.dtype = torch.float32
    vision_layers: int = 3
    vision_width: int = 128

    @property
    def name(self) -> str:
        return f"{self.layers} layers, width {self.width}, {str(self.dtype).removeprefix('torch.')}"


SMALL = Shape()
LARGE = Shape(32, 4096, torch.bfloat16, 24, 1024)  # LLaVA-1.5-7B


def shape_for(device: torch.device, layers: int | None = None) -> Shape:
    """LLaVA-1.5-7B on a GPU, a small model elsewhere; with another number of layers where it is given."""
    shape = LARGE if device.type == "cuda" else SMALL
    return shape if layers is None else replace(shape, layers=layers)


def build(device: torch.device, shape: Shape) -> LlavaForConditionalGeneration:
    """The model, with EOS disabled so that every answer has the same length."""
    heads = max(1, shape.width // 128) if shape.width >= 4096 else max(1, shape.width // 64)
    tower = max(1, shape.vision_width // 64)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=shape.width, intermediate_size=shape.width * 43 // 16,
            num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=32768,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers, num_attention_heads=tower, image_size=336, patch_size=14,
            projection_dim=shape.vision_width,
        ),
        image_token_index=IMAGE_ID, image_seq_length=IMAGE_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration, length: int, batch: int, seed: int) -> dict[str, Any]:
    """A system prompt, one image of 576 tokens, then text up to `length` tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 32000, (batch, length), generator=random)
    ids[:, 0] = 1
    ids[:, SYSTEM_TOKENS : SYSTEM_TOKENS + IMAGE_TOKENS] = IMAGE_ID
    pixels = torch.randn(batch, 3, 336, 336, generator=random).to(device=model.device, dtype=model.dtype)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones(batch, length, dtype=torch.long, device=model.device),
        "pixel_values": pixels,
    }


@dataclass(frozen=True)
class Arm:
    """One way to generate: what is entered around it, and what produces `tokens` tokens."""

    name: str
    backend: str
    enter: Callable[[], AbstractContextManager[Any]]
    run: Callable[[dict[str, Any], int], object]
    compiles: bool = False  # each time it is entered: an answer that is not timed comes first


def arm(model: Any, text: str) -> Arm:
    """An arm from its text: ``vanilla``, ``empty``, ``eager-maps``, ``sequential``, or a method as in ``mmfix eval``.

    A method may be followed by ``@backend`` to force one. ``static/`` before a method, ``empty`` or ``vanilla`` decodes
    it on a cache of fixed size, which `generate` compiles on a GPU, with CUDA graphs.
    """
    spec, _, backend = text.partition("@")
    fixed = spec.startswith(STATIC)
    spec = spec.removeprefix(STATIC)
    if fixed and spec in (EAGER, SEQUENTIAL):
        raise UsageError(f"arm {text!r}: {spec} has no cache of fixed size; put {STATIC} before a method or {VANILLA}")
    if fixed:
        return Arm(text, backend, lambda: compiled(model, spec, backend), partial(greedy_static, model), compiles=True)
    if spec in (VANILLA, EAGER, SEQUENTIAL):
        run = {VANILLA: greedy, EAGER: greedy_with_maps, SEQUENTIAL: two_branches_in_turn}[spec]
        return Arm(text, "", nullcontext, lambda inputs, tokens: run(model, inputs, tokens))

    def enter() -> AbstractContextManager[Any]:
        return mitigated(model, spec, backend)

    return Arm(text, backend, enter, lambda inputs, tokens: greedy(model, inputs, tokens))


@contextmanager
def compiled(model: Any, spec: str, backend: str) -> Iterator[None]:
    """`mitigated`, or the plain model, with nothing compiled before."""
    torch._dynamo.reset()  # else what earlier rounds compiled fills its cache
    with nullcontext() if spec == VANILLA else mitigated(model, spec, backend):
        yield


@contextmanager
def mitigated(model: Any, spec: str, backend: str) -> Iterator[None]:
    """The model with a method (``empty``: the machinery alone), by one backend where it is named."""
    import mmfix
    from mmfix_evals.arms import resolve

    before = os.environ.pop("MMFIX_BACKEND", None)
    if backend:
        os.environ["MMFIX_BACKEND"] = backend
    try:
        with mmfix.mitigate(model, None if spec == EMPTY else list(resolve(spec).methods)):
            yield
    finally:
        os.environ.pop("MMFIX_BACKEND", None)
        if before is not None:
            os.environ["MMFIX_BACKEND"] = before


def greedy(model: Any, inputs: dict[str, Any], tokens: int, **more: Any) -> Any:
    """Exactly `tokens` greedy tokens."""
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)


def greedy_static(model: Any, inputs: dict[str, Any], tokens: int) -> Any:
    """`greedy` on a cache of fixed size; its decoding steps are compiled on a GPU."""
    return greedy(model, inputs, tokens, cache_implementation="static")


def greedy_with_maps(model: Any, inputs: dict[str, Any], tokens: int) -> Any:
    """What released implementations do: eager attention that hands out its maps."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return greedy(model, inputs, tokens, output_attentions=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation(before)


def two_branches_in_turn(model: Any, inputs: dict[str, Any], tokens: int) -> torch.Tensor:
    """Contrast decoding as released: the picture encoded for each branch, one forward after the other, two caches."""
    noised = {**inputs, "pixel_values": inputs["pixel_values"] + 0.5}
    states = [model(**one, use_cache=True, logits_to_keep=1) for one in (inputs, noised)]
    mask = inputs["attention_mask"]
    found = []
    for step in range(tokens):
        mixed = 2.0 * states[0].logits[:, -1].float() - states[1].logits[:, -1].float()
        found.append(mixed.argmax(-1, keepdim=True))
        if step + 1 == tokens:
            break
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        states = [
            model(
                input_ids=found[-1], attention_mask=mask, past_key_values=one.past_key_values, use_cache=True,
                logits_to_keep=1,
            )
            for one in states
        ]  # fmt: skip
    return torch.cat(found, dim=1)


def case_name(shape: Shape, length: int, batch: int) -> str:
    return re.sub(r"\s+", " ", f"{shape.name}, {length} tokens, batch {batch}")
