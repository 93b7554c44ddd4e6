"""The tiny LLaVA of the recorded outputs, as a transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_ID = 319


def load_golden_llava(folder: Path) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor], dict[str, Any]]:
    """The recorded tiny LLaVA as a transformers model, its recorded outputs, and their configuration."""
    meta = json.loads((folder / "meta.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    text, vision = dict(meta["llm_config"]), dict(meta["vision_config"])
    text = {k: v for k, v in text.items() if not k.startswith("mm_") and k != "pretraining_tp"}
    keep = (
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "patch_size",
        "image_size",
        "layer_norm_eps",
        "hidden_act",
        "attention_dropout",
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**{k: vision[k] for k in keep}),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    renamed = {}
    for name, value in weights.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a constant of the architecture
        if name == "lm_head.weight":
            renamed[name] = value
        elif name.startswith("model.mm_projector."):
            number = {"0": "linear_1", "2": "linear_2"}[name.split(".")[2]]
            renamed[f"model.multi_modal_projector.{number}.{name.split('.')[3]}"] = value
        elif name.startswith("model.vision_tower.vision_tower."):
            tail = name.removeprefix("model.vision_tower.vision_tower.")
            target = f"model.vision_tower.{tail}"
            if target not in model.state_dict():
                target = f"model.vision_tower.{tail.removeprefix('vision_model.')}"
            renamed[target] = value
        else:
            renamed[f"model.language_model.{name.removeprefix('model.')}"] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("position_ids" in name or "rotary" in name for name in missing), missing
    return model, load_file(folder / "golden.safetensors"), meta


def expanded_ids(ids: torch.Tensor, images: int) -> torch.Tensor:
    """The prompt with its one placeholder (-200) repeated once per image token."""
    row = ids[0].tolist()
    at = row.index(-200)
    return torch.tensor([[*row[:at], *[IMAGE_ID] * images, *row[at + 1 :]]])
