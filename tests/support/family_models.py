"""Tiny random models made from configurations, one per family."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from support.family_pictures import END_ID, IMAGE_ID, START_ID, VIDEO_ID, VOCABULARY

HIDDEN, HEADS, LAYERS = 32, 4, 4


def finish(model: Any, gain: float = 1.2) -> Any:
    """Weights large enough for edits to show, the same in every process; no end-of-text token, so lengths are known."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                spread = 0.4 if "embed" in name else gain * weight[0].numel() ** -0.5
                weight.normal_(0.0, spread, generator=generator)
            elif "norm" not in name.lower():
                weight.normal_(0.0, 0.1, generator=generator)
    for module in (model, getattr(model, "language_model", None)):
        config = getattr(module, "generation_config", None)
        if config is not None:
            config.eos_token_id, config.pad_token_id, config.bos_token_id = None, 0, 1
    return model.eval()


def text(cls: Any, **more: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return cls(**{**common, **more})


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_PACKED = {
    "depth": 3, "num_heads": 4, "in_channels": 3, "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip


def clip() -> Any:
    return hf.CLIPVisionConfig(**TOWER, image_size=24, patch_size=8, projection_dim=32)


def siglip(size: int = 24) -> Any:
    return hf.SiglipVisionConfig(**TOWER, image_size=size, patch_size=8, vision_use_head=False)


def pixtral() -> Any:
    return hf.PixtralVisionConfig(**TOWER, image_size=64, patch_size=8)


def llava(words: Any, vision: Any, **more: Any) -> Any:
    return finish(hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=words, vision_config=vision, image_token_index=IMAGE_ID, image_seq_length=9,
                       **more)))  # fmt: skip


def llava_siglip() -> Any:
    return llava(text(hf.Qwen2Config), siglip(), vision_feature_select_strategy="full", vision_feature_layer=-1)


def pixtral_llava() -> Any:
    return llava(text(hf.MistralConfig, head_dim=8, sliding_window=None), pixtral(),
                 vision_feature_select_strategy="full", vision_feature_layer=-1)  # fmt: skip


def llava_next() -> Any:
    return anyres(hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig, clip())


def llava_onevision() -> Any:
    return anyres(hf.LlavaOnevisionForConditionalGeneration, hf.LlavaOnevisionConfig, siglip())


def anyres(cls: Any, config: Any, vision: Any, **more: Any) -> Any:
    """LLaVA-NeXT and -OneVision: tiles of 24 pixels, two pictures' shapes."""
    words = text(hf.Qwen2Config if cls is hf.LlavaOnevisionForConditionalGeneration else hf.MistralConfig)
    return finish(cls(config(
        text_config=words, vision_config=vision, image_token_index=IMAGE_ID, image_grid_pinpoints=[[24, 48], [48, 24]],
        **more)))  # fmt: skip


def qwen(cls: Any, config: Any, vision: dict[str, Any], hidden: int = HIDDEN, **rope: Any) -> Any:
    kinds = {name: getattr(kind, "config_class", kind) for name, kind in config.sub_configs_defaults.items()}
    head = {"head_dim": HIDDEN // HEADS} if cls is hf.Qwen3VLForConditionalGeneration else {}
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **rope}
    words = text(kinds["text_config"], hidden_size=hidden, rope_parameters=parameters, **head)
    tower = kinds["vision_config"](**_PACKED, **vision)
    ends = {"vision_start_token_id": START_ID, "vision_end_token_id": END_ID}
    if cls is hf.Glm4vForConditionalGeneration:
        ends = {"image_start_token_id": START_ID, "image_end_token_id": END_ID,
                "video_start_token_id": 93, "video_end_token_id": 94}  # fmt: skip
    return finish(
        cls(config(text_config=words, vision_config=tower, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, **ends))
    )


def qwen2_vl() -> Any:
    return qwen(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, {"embed_dim": 32, "hidden_size": HIDDEN})


def qwen2_5_vl() -> Any:
    """Windows of 4x4 patches; only the last block looks everywhere."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN, "window_size": 32,
              "fullatt_block_indexes": [2]}  # fmt: skip
    return qwen(hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, vision)


def qwen3_vl() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN, "num_position_embeddings": 64,
              "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    return qwen(hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, vision, mrope_interleaved=True)


def glm4v() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 32}
    return qwen(hf.Glm4vForConditionalGeneration, hf.Glm4vConfig, vision, hidden=64, partial_rotary_factor=0.5)


def internvl() -> Any:
    vision = hf.InternVLVisionConfig(**TOWER, image_size=(32, 32), patch_size=(8, 8), layer_scale_init_value=1.0)
    return finish(hf.InternVLForConditionalGeneration(hf.InternVLConfig(
        text_config=text(hf.Qwen2Config), vision_config=vision, image_token_id=IMAGE_ID,
        image_seq_length=4)))  # fmt: skip


def idefics2() -> Any:
    perceiver = {"hidden_size": HIDDEN, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
                 "resampler_head_dim": 8, "num_key_value_heads": 2}  # fmt: skip
    vision = hf.models.idefics2.Idefics2VisionConfig(**TOWER, image_size=24, patch_size=8)
    return finish(hf.Idefics2ForConditionalGeneration(hf.Idefics2Config(
        text_config=text(hf.MistralConfig, sliding_window=None), vision_config=vision, perceiver_config=perceiver,
        image_token_id=IMAGE_ID)))  # fmt: skip


def idefics3() -> Any:
    return _idefics3(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config, hf.models.idefics3.Idefics3VisionConfig)


def smolvlm() -> Any:
    return _idefics3(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig, hf.models.smolvlm.SmolVLMVisionConfig)


def _idefics3(cls: Any, config: Any, kind: Any) -> Any:
    return finish(cls(config(
        text_config=text(hf.LlamaConfig), vision_config=kind(**TOWER, image_size=32, patch_size=8),
        image_token_id=IMAGE_ID, scale_factor=2)))  # fmt: skip


def paligemma() -> Any:
    words = text(hf.GemmaConfig, head_dim=8)
    return finish(hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(
        text_config=words, vision_config=siglip(), image_token_index=IMAGE_ID, projection_dim=HIDDEN,
        hidden_size=HIDDEN, vocab_size=VOCABULARY)))  # fmt: skip


def gemma3() -> Any:
    words = text(
        hf.Gemma3TextConfig, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return finish(hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        text_config=words, vision_config=siglip(32), image_token_index=IMAGE_ID, mm_tokens_per_image=4,
        boi_token_index=START_ID, eoi_token_index=END_ID)))  # fmt: skip


def mistral3() -> Any:
    return finish(hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(
        text_config=text(hf.MistralConfig, head_dim=8, sliding_window=None), vision_config=pixtral(),
        image_token_index=IMAGE_ID)))  # fmt: skip


def aya() -> Any:
    words = text(hf.Cohere2Config, sliding_window=8)
    return finish(hf.AyaVisionForConditionalGeneration(hf.AyaVisionConfig(
        text_config=words, vision_config=siglip(32), image_token_index=IMAGE_ID)))  # fmt: skip


def instructblip() -> Any:
    return finish(hf.InstructBlipForConditionalGeneration(hf.InstructBlipConfig(
        text_config=text(hf.LlamaConfig), vision_config=hf.InstructBlipVisionConfig(**TOWER, **BLIP_PICTURE),
        qformer_config=hf.InstructBlipQFormerConfig(**QFORMER), num_query_tokens=4, image_token_index=IMAGE_ID,
    )))  # fmt: skip


def blip_2() -> Any:
    words = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=256, word_embed_proj_dim=HIDDEN, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return finish(hf.Blip2ForConditionalGeneration(hf.Blip2Config(
        text_config=words, vision_config=hf.Blip2VisionConfig(**TOWER, **BLIP_PICTURE),
        qformer_config=hf.Blip2QFormerConfig(**QFORMER), num_query_tokens=4, image_token_index=IMAGE_ID,
    )))  # fmt: skip


BLIP_PICTURE = {"image_size": 16, "patch_size": 8}
QFORMER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "cross_attention_frequency": 2, "encoder_hidden_size": 32,
}  # fmt: skip


def mllama() -> Any:
    """Cross-attention in layers 1 and 3 of six."""
    words = text(
        hf.MllamaTextConfig,
        cross_attention_layers=[1, 3],
        num_hidden_layers=6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    vision = hf.MllamaVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
        image_size=16, patch_size=8, max_num_tiles=4, intermediate_layers_indices=[0], vision_output_dim=64,
    )  # fmt: skip
    model = finish(hf.MllamaForConditionalGeneration(hf.MllamaConfig(
        text_config=words, vision_config=vision, image_token_index=IMAGE_ID)))  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate"):
                weight.fill_(0.8)
    return model
