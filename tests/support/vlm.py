"""Tiny vision-language models made from configurations, and prompts for them. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_ID = 99
IMAGE_TOKENS = 9  # a 24-pixel picture in patches of 8
VOCABULARY = 100
LAYERS = 5
HEADS = 8
HIDDEN = 64
MODELS = ("llava", "llava-gqa")


def tiny_llava(kv_heads: int = HEADS, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA of five layers and eight heads whose random weights are large enough for edits to show.

    Head 2 of layer 3 (and the heads that share its values) has large values, so that VHR's outlier rule has work.
    """
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=512,
            initializer_range=0.15, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, projection_dim=32,
            image_size=24, patch_size=8, initializer_range=0.3,
        ),
        image_token_index=IMAGE_ID, image_seq_length=IMAGE_TOKENS, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    width = HIDDEN // HEADS
    group = 2 // (HEADS // kv_heads)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("language_model" in name or "projector" in name or "lm_head" in name):
                weight.normal_(0.0, 0.15)
        model.model.language_model.layers[3].self_attn.v_proj.weight[group * width : (group + 1) * width] *= 6.0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build(name: str) -> LlavaForConditionalGeneration:
    """A tiny model by name."""
    return tiny_llava(HEADS if name == "llava" else HEADS // 2)


def tokens(*parts: int | str, seed: int = 0) -> list[int]:
    """Token ids: BOS, then for each part that many random text tokens, or ``"image"`` for one picture's tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1]
    for part in parts:
        if part == "image":
            ids += [IMAGE_ID] * IMAGE_TOKENS
        else:
            ids += torch.randint(5, IMAGE_ID, (int(part),), generator=generator).tolist()
    return ids


def picture(seed: int = 0, count: int = 1) -> Tensor:
    """Float[count, 3, 24, 24]: random pictures."""
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(100 + seed))


def batch(rows: list[list[int]], pictures: Tensor | None = None, width: int = 0, side: str = "left") -> dict[str, Any]:
    """Model inputs from rows of token ids, padded on one side to the longest row or to `width`."""
    width = max(width, *(len(row) for row in rows))
    ids, mask = [], []
    for row in rows:
        pad = width - len(row)
        ids.append([0] * pad + row if side == "left" else row + [0] * pad)
        mask.append([0] * pad + [1] * len(row) if side == "left" else [1] * len(row) + [0] * pad)
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if pictures is not None:
        inputs["pixel_values"] = pictures
    return inputs


def one(seed: int = 0, after: int = 6, system: int = 3) -> dict[str, Any]:
    """One prompt with one picture."""
    return batch([tokens(system, "image", after, seed=seed)], picture(seed))


def logits(model: Any, inputs: dict[str, Any], **extra: Any) -> Tensor:
    """Logits of one forward pass, no cache."""
    with torch.no_grad():
        return model(**inputs, use_cache=False, **extra).logits


def greedy(model: Any, inputs: dict[str, Any], steps: int = 6, **extra: Any) -> Any:
    """Greedy generation of exactly `steps` tokens, with the scores of every step."""
    options = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **{**options, **extra})
