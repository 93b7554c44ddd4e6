"""The four training stages: what one step of each computes.

1. ``patches``: the tower alone, against which objects cover each patch (binary cross-entropy, positive weight 4).
2. ``words``: the same labels through the projector, as the cosine between an image token and the language model's own
   word embeddings, so that image tokens start in word space.
3. ``answers``: the language model on many yes/no turns behind one picture.
4. ``mixed``: batches of captions and batches of yes/no turns.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfix_evals.tinyworld.layout import Layout
from mmfix_evals.tinyworld.model import IMAGE, IMAGE_ID, MEAN, STD, split_words
from mmfix_evals.tinyworld.pictures import patch_labels
from mmfix_evals.tinyworld.recipe import Recipe, Stage
from mmfix_evals.tinyworld.text import CAPTION_PROMPT, answer, ask_about, caption, question
from mmfix_evals.tinyworld.world import CATEGORIES, Scene, scene

IGNORE = -100
POSITIVE_WEIGHT = 4.0
ANSWERS, CAPTIONS = 14, 2  # turns behind one picture


class Trainee(nn.Module):
    """The model with the heads that only training needs."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.patch_head = nn.Linear(recipe.vision_width, len(CATEGORIES))
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.shift = nn.Parameter(torch.tensor(-4.0))

    def tower_parameters(self) -> list[nn.Parameter]:
        return list(self.model.model.vision_tower.parameters())

    def other_parameters(self) -> list[nn.Parameter]:
        tower = {id(p) for p in self.tower_parameters()}
        return [p for p in self.parameters() if id(p) not in tower]

    def patch_features(self, pixels: Tensor) -> Tensor:
        """[B, patches, width]: the features that LLaVA takes, the tower's last layer but one."""
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return hidden[-2][:, 1:]  # type: ignore[no-any-return]


class Lessons:
    """Batches of a recipe: pictures, labels and token sequences, each a pure function of (seed, stage, step)."""

    def __init__(self, recipe: Recipe, words: list[str], pictures: np.ndarray[Any, Any], device: str) -> None:
        self.recipe = recipe
        self.ids = {word: n for n, word in enumerate(words)}
        self.pictures = pictures
        self.device = device
        first_word = [split_words(name)[0] for name in CATEGORIES]
        self.category_ids = torch.tensor([self.ids[word] for word in first_word], device=device)
        self._scenes: dict[int, Scene] = {}

    def draw(self, stage: Stage, step: int) -> tuple[list[Scene], Tensor, random.Random]:
        """Scenes, pixels [B, 3, 96, 96] and a generator for one step."""
        rng = random.Random(f"{self.recipe.seed}/{stage.name}/{step}")
        chosen = sorted(rng.randrange(len(self.pictures)) for _ in range(stage.batch))
        pixels = torch.from_numpy(self.pictures[chosen]).permute(0, 3, 1, 2).to(self.device, torch.float32) / 255
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        return [self.scene(n) for n in chosen], (pixels - mean) / std, rng

    def scene(self, index: int) -> Scene:
        if index not in self._scenes:
            self._scenes[index] = scene("train", index)
        return self._scenes[index]

    def labels(self, items: list[Scene]) -> Tensor:
        """Float [B, patches, categories]."""
        return torch.from_numpy(patch_labels(items, self.recipe.patch)).to(self.device, torch.float32)

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in split_words(text)]

    def turns(self, items: list[Scene], rng: random.Random, captions: bool) -> tuple[Tensor, Tensor, Layout]:
        """Ids and labels [B, prefix + turns * length] of independent turns behind one picture each.

        A turn sees the picture and itself, as it does in use; only its answer is learnt.
        """
        prefix = [self.ids["<s>"], *self.encode("USER:"), *[self.ids[IMAGE]] * self.recipe.image_tokens]
        rows = [[self.turn(*pair) for pair in self.pairs(item, rng, captions)] for item in items]
        length = max(len(ids) for row in rows for ids, _ in row)
        layout = Layout(len(prefix), len(rows[0]), length)
        ids = torch.zeros(len(rows), layout.total, dtype=torch.long)
        labels = torch.full((len(rows), layout.total), IGNORE)
        ids[:, : layout.prefix] = torch.tensor(prefix)
        for n, row in enumerate(rows):
            for number, (turn, learnt) in enumerate(row):
                start = layout.prefix + number * length
                ids[n, start : start + len(turn)] = torch.tensor(turn)
                labels[n, start : start + len(turn)] = torch.tensor(learnt)
        return ids.to(self.device), labels.to(self.device), layout

    def pairs(self, item: Scene, rng: random.Random, captions: bool) -> list[tuple[str, str]]:
        """Questions and noisy answers about one scene."""
        if captions:
            return [(CAPTION_PROMPT, caption(item, rng, noisy=True)) for _ in range(CAPTIONS)]
        return [(question(name), answer(item, name, rng)) for name in ask_about(item, ANSWERS, rng)]

    def turn(self, asked: str, told: str) -> tuple[list[int], list[int]]:
        prompt = self.encode(f"{asked} ASSISTANT:")
        reply = [*self.encode(told), self.ids["</s>"]]
        return prompt + reply, [IGNORE] * len(prompt) + reply


def loss_of(trainee: Trainee, lessons: Lessons, stage: Stage, step: int) -> tuple[Tensor, dict[str, float]]:
    """Loss and progress figures of one step."""
    items, pixels, rng = lessons.draw(stage, step)
    pixels = pixels.to(trainee.patch_head.weight.dtype)
    if stage.name == "patches":
        return _patch_loss(trainee.patch_head(trainee.patch_features(pixels)), lessons.labels(items))
    if stage.name == "words":
        return _word_loss(trainee, lessons, pixels, lessons.labels(items))
    ids, labels, layout = lessons.turns(items, rng, rng.random() < stage.captions)
    with layout.attention(trainee.model):
        positions = layout.positions(ids.device)
        logits = trainee.model(input_ids=ids, position_ids=positions, pixel_values=pixels, use_cache=False).logits
    learnt = labels[:, 1:] != IGNORE
    return _turn_loss(logits[:, :-1][learnt].float(), labels[:, 1:][learnt], lessons)


def _patch_loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    scores = scores.float()
    weight = torch.tensor(POSITIVE_WEIGHT, device=scores.device)
    loss = F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight)
    hit, right = scores > 0, labels > 0
    recall = float((hit & right).sum() / right.sum().clamp(min=1))
    precision = float((hit & right).sum() / hit.sum().clamp(min=1))
    return loss, {"loss": loss.item(), "recall": recall, "precision": precision}


def _word_loss(trainee: Trainee, lessons: Lessons, pixels: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    tokens = trainee.model.model.multi_modal_projector(trainee.patch_features(pixels)).float()
    table = trainee.model.get_input_embeddings().weight.float()
    cosine = F.normalize(tokens, dim=-1) @ F.normalize(table[lessons.category_ids], dim=-1).T
    loss, figures = _patch_loss(cosine * trainee.scale.float() + trainee.shift.float(), labels)
    # Image tokens as long as words are: the language model should not have to learn another scale.
    size = table.detach().square().mean()
    return loss + 0.1 * (tokens.square().mean() - size).abs() / size, figures


def _turn_loss(logits: Tensor, labels: Tensor, lessons: Lessons) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy over the answers' tokens; `logits` [N, vocabulary], `labels` [N]."""
    loss = F.cross_entropy(logits, labels)
    yes_no = (labels == lessons.ids["yes"]) | (labels == lessons.ids["no"])
    if not bool(yes_no.any()):
        return loss, {"caption loss": loss.item()}
    right = (logits[yes_no].argmax(-1) == labels[yes_no]).float().mean()
    return loss, {"loss": loss.item(), "answers": right.item()}


assert IMAGE_ID == 4, "the vocabulary begins with the special tokens"
