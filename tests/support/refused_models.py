"""Tiny models that cannot be served, each for a fact of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from support import family_models as m
from support.family_pictures import IMAGE_ID, VOCABULARY


def got_ocr() -> Any:
    """A vision tower (SAM's) whose attention adds relative positions outside the AttentionInterface."""
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48,
              "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1]}  # fmt: skip
    return hf.GotOcr2ForConditionalGeneration(hf.GotOcr2Config(
        text_config=m.text(hf.Qwen2Config), vision_config=vision, image_token_index=IMAGE_ID)).eval()  # fmt: skip


def _blip_2_t5() -> Any:
    words = hf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return hf.Blip2ForConditionalGeneration(hf.Blip2Config(
        text_config=words, vision_config=hf.Blip2VisionConfig(**m.TOWER, **m.BLIP_PICTURE),
        qformer_config=hf.Blip2QFormerConfig(**m.QFORMER), num_query_tokens=4, image_token_index=IMAGE_ID,
    ))  # fmt: skip


def _git() -> Any:
    vision = {**m.TOWER, "image_size": 16, "patch_size": 8}
    return hf.GitForCausalLM(hf.GitConfig(
        vocab_size=VOCABULARY, vision_config=vision, bos_token_id=1, eos_token_id=2, **m.TOWER))  # fmt: skip


def _blip() -> Any:
    words = {"vocab_size": VOCABULARY, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2, **m.TOWER}
    return hf.BlipForConditionalGeneration(hf.BlipConfig(
        text_config=words, vision_config={**m.TOWER, "image_size": 16, "patch_size": 8}))  # fmt: skip


REFUSED: dict[str, Callable[[], Any]] = {
    "BLIP-2 and InstructBLIP with T5": _blip_2_t5,
    "GIT": _git,
    "BLIP": _blip,
    "text-only models": lambda: hf.LlamaForCausalLM(m.text(hf.LlamaConfig)),
}
