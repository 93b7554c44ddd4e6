"""Break the kernels of the statistics and of the contrast step: each turns their own cases red. Interpreter only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mutating import Mutate, broken  # noqa: F401
from other_cases import test_contrast as contrast
from other_cases import test_places_of_keys as places
from statistics_cases import test_column_masses as columns
from statistics_cases import test_column_masses_of_rows_that_differ_between_prompts as staggered
from statistics_cases import test_column_masses_under_a_mask_of_each_head as masked_heads
from statistics_cases import test_head_divergence as divergence

from mmfix_kernels import Rows

Check = Callable[[pytest.MonkeyPatch], None]


def of_columns(shape: str, edits: str = "plain") -> Check:
    return lambda patch: columns(shape, edits, Rows.ALL)


def of_contrast(rows: int = 2, beta: float = 0.1, size: int = 129) -> Check:
    weights = {0: (0.0, 1.0), 1: (1.0,), 2: (2.0, -1.0), 3: (2.0, -0.5, -0.5)}[rows]
    return lambda patch: contrast(weights, beta, torch.float32, size, patch)


def of_rows() -> Check:
    return lambda patch: staggered()


def of_heads() -> Check:
    return lambda patch: divergence(torch.float32)


def of_places() -> Check:
    return lambda patch: places()


MUTATIONS: dict[str, tuple[str, str, str, Check]] = {
    "causal mask": ("columns", "b_allowed & (b_col[None, :] <= b_row[:, None])", "b_allowed", of_columns("causal")),
    "first row of a causal block": (
        "columns", "tl.program_id(0) * BLOCK_N)\n", "(tl.program_id(0) + 1) * BLOCK_N)\n", of_columns("causal"),
    ),
    "bool mask": ("columns", "b_allowed & (b_mask != 0)", "b_allowed", of_columns("padded")),
    "additive mask": ("columns", "b_allowed & (b_mask.to(tl.float32) > lowest)", "b_allowed",
                      of_columns("additive", "pai")),
    "batch row of the mask": ("columns", "p_mask + batch.to(tl.int64) * mask_b", "p_mask", of_columns("padded")),
    "head of the mask": (
        "columns", "head.to(tl.int64) * mask_h", "head.to(tl.int64) * 0", lambda patch: masked_heads(),
    ),
    "key heads": ("columns", "(head // GROUP).to(tl.int64) * k_h", "head.to(tl.int64) * 0", of_columns("grouped")),
    "score edit": ("columns", "b_s = edit_scores(", "_ = edit_scores(", of_columns("causal", "pai")),
    "group of a score edit": ("columns", "(SCORES >> (8 * n)) & 255", "255", of_columns("causal", "pai")),
    "rows that are counted": (
        "columns", "b_live & (tl.load(p_chosen", "b_live | (tl.load(p_chosen",
        of_rows(),
    ),
    "rows that see a key": ("columns", "b_allowed & b_live[:, None]", "b_allowed", of_rows()),
    "scale of the scores": ("columns", "PRECISION) * factor", "PRECISION)", of_columns("causal")),
    "the other run": ("columns", "b_apart = b_with - b_without", "b_apart = b_with", of_heads()),
    "size of a head": ("columns", "b_without * b_without", "b_with * b_with", of_heads()),
    "batch row of a head": ("columns", "p_b + batch * b_b", "p_b", of_heads()),
    "places beyond the first block": ("maps", "before += tl.sum(b_real, axis=0)", "before += 0", of_places()),
    "places of each prompt": ("maps", "p_labels + batch * labels_b + b_col", "p_labels + b_col", of_places()),
    "prompt of the logits": ("vocabulary", "p_x + batch * x_b", "p_x", of_contrast()),
    "batch row of the keys": ("columns", "batch.to(tl.int64) * k_b", "batch.to(tl.int64) * 0", of_columns("padded")),
    "labels of the batch row": (
        "columns", "batch.to(tl.int64) * labels_b", "batch.to(tl.int64) * 0", of_columns("padded", "pai"),
    ),
    "row sums of the head": (
        "columns", "(tl.program_id(1).to(tl.int64) * L + b_row) * 2", "b_row.to(tl.int64) * 2", of_columns("causal"),
    ),
    "the cut": ("vocabulary", "b_dead = b_dead | (b_plain < least)", "b_dead = b_dead", of_contrast()),
    "share of the cut": ("vocabulary", "axis=0) + log_beta", "axis=0)", of_contrast(1)),
    "the cut looks at the plain row": ("vocabulary", "(b_plain < least)", "(b_mix < least)", of_contrast()),
    "largest logit of all blocks": ("vocabulary", "b_top = tl.maximum(b_top, b_x)", "b_top = b_x", of_contrast()),
    "weight of the plain row": ("vocabulary", "tl.load(p_weights) *", "1.0 *", of_contrast()),
    "weight of a branch": ("vocabulary", "tl.load(p_weights + r) *", "tl.load(p_weights) *", of_contrast(3, 0.0)),
    "logits of a branch": ("vocabulary", "p_row + r * x_r", "p_row", of_contrast()),
    "tokens that the plain row excludes": ("vocabulary", "b_dead = b_plain == NEG_INF", "b_dead = b_plain != b_plain",
                                           of_contrast(0, 0.0)),
    "tokens that a branch excludes": ("vocabulary", "b_dead | (b_x == NEG_INF)", "b_dead", of_contrast(3, 0.0)),
    "first of equals": ("vocabulary", "b_more = b_mix > b_best", "b_more = b_mix >= b_best", of_contrast()),
    "first of equal lanes": (
        "vocabulary", "tl.min(b_at, axis=0)", "tl.max(tl.where(b_best == top, b_at, 0), axis=0)", of_contrast(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name: str, broken: Mutate, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module, old, new, check = MUTATIONS[name]
    broken(module, old, new)
    with pytest.raises(AssertionError):
        check(monkeypatch)
