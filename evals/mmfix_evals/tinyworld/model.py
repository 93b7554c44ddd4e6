"""The TinyWorld model: an ordinary small LLaVA with a word-level tokenizer, made from configurations."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mmfix_evals.tinyworld.recipe import Recipe
from mmfix_evals.tinyworld.text import CAPTION_PROMPT, caption, question
from mmfix_evals.tinyworld.world import CATEGORIES, SCENES, SIZE, scene, stream

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE)
IMAGE_ID = SPECIAL.index(IMAGE)

# Words that questions to a vision-language model commonly hold; the model was not trained on most of them, but a
# prompt that uses them is at least read as words and not as a row of unknowns.
_PROMPT_WORDS = (
    "what which who where how many much do does you see can tell me about show shown describe picture photo image "
    "briefly short answer question with one word using single or phrase yes no not is are any it they object objects"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def vocabulary() -> list[str]:
    """All tokens in order of their ids; a pure function of the world's text."""
    rng = stream("vocabulary")
    texts = [CAPTION_PROMPT, "USER: ASSISTANT: Yes No Yes. No.", " ".join(SCENES), " ".join(CATEGORIES), _PROMPT_WORDS]
    texts += [question(name) for name in CATEGORIES]
    texts += [caption(scene("train", n), rng, noisy=True) for n in range(400)]
    words: list[str] = list(SPECIAL)
    for text in texts:
        for word in split_words(text):
            if word not in words:
                words.append(word)
    return words


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of a text, as the tokenizer splits it (lower case)."""
    for mark in ".,:?!":
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


def build_tokenizer(words: list[str]) -> Any:
    """A ``PreTrainedTokenizerFast`` over whole words: left padding, BOS in front."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(words: list[str], recipe: Recipe) -> Any:
    """A ``LlavaProcessor`` with the PIL image processor (no torchvision needed)."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
        resample=3,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(words),
        patch_size=recipe.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(words: list[str], recipe: Recipe) -> Any:
    """A freshly initialised ``LlavaForConditionalGeneration``; seed torch before for the same weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=recipe.text_width,
        intermediate_size=recipe.text_mlp,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_width // 32,
        num_key_value_heads=recipe.text_width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=recipe.vision_mlp,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_width // 32,
        hidden_act="gelu",
        image_size=SIZE,
        patch_size=recipe.patch,
        projection_dim=recipe.vision_width,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_ID,
        image_seq_length=recipe.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    return LlavaForConditionalGeneration(config)


def export(model: Any, words: list[str], recipe: Recipe, folder: Path) -> None:
    """Write a loadable model folder (bfloat16 safetensors, tokenizer, processor); each file is replaced atomically."""
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        copy = build_model(words, recipe)
        copy.load_state_dict(model.state_dict())
        copy.to(torch.bfloat16).save_pretrained(name)
        build_processor(words, recipe).save_pretrained(name)
        generation.save_pretrained(name)
        for path in sorted(Path(name).iterdir()):
            temporary = folder / f".{path.name}.tmp"
            shutil.copyfile(path, temporary)
            os.replace(temporary, folder / path.name)
