"""A random LLaVA with tokenizer, chat template and image processor, and random pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [
    *("USER:", "ASSISTANT:", "a", "the", "cat", "dog", "cup", "is", "there", "in", "image", "picture", "?", ".", ","),
    *("yes", "no", "describe", "please", "this", "two", "and"),
]
TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def make_processor(template: str | None = TEMPLATE) -> LlavaProcessor:
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return LlavaProcessor(
        pictures,
        make_tokenizer(),
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def make_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(10)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=24,
            patch_size=6, initializer_range=0.3,
        ),
        text_config=LlamaConfig(
            vocab_size=len(SPECIAL + WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_id=4, image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed_tokens" not in name:
                weight.normal_(0.0, 0.25)
        model.lm_head.weight[0] = 0.0  # a random model would now and then say <pad>
    return model


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)
