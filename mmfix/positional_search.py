"""Hidden dimensions that carry position: those that grow or fall steadily along random text, in many layers.

After *Mitigate Position Bias in Large Language Models via Scaling a Single Dimension* (arXiv:2406.02536): states are
averaged over random texts, so that what is left depends on the position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfix.errors import MmfixError
from mmfix.families import Family

WINDOW, ORDER = 11, 3  # of the Savitzky-Golay filter; the paper says 10, which has no middle
LEAST = 32  # tokens of text below which a cubic fits anything


def random_texts(vocabulary: Sequence[int], count: int, tokens: int, seed: int = 0) -> Tensor:
    """Int64[count, tokens] of ids drawn from `vocabulary`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(vocabulary)[torch.randint(len(vocabulary), (count, tokens), generator=generator)]


def mean_states(family: Family, texts: Tensor, size: int = 8, progress: Callable[[int], None] | None = None) -> Tensor:
    """Float32[layers, T, hidden]: the layers' inputs, averaged over texts Int64[N, T]."""
    total: Tensor | None = None
    device = next(family.model.parameters()).device
    for first in range(0, len(texts), size):
        ids = texts[first : first + size].to(device)
        with torch.no_grad():
            out = family.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
            )
        states = torch.stack([h.float().sum(0) for h in out.hidden_states[: family.num_layers]])
        total = states if total is None else total + states
        if progress is not None:
            progress(len(ids))
    if total is None:
        raise MmfixError("no texts to look for positional dimensions in; give at least one")
    return total / len(texts)


def steady(states: Tensor) -> Tensor:
    """Bool[layers, hidden]: dimensions whose cubic fit over the last seven tenths of the text is monotone."""
    part = states[:, round(0.3 * states.shape[1]) :]
    x = torch.linspace(-1, 1, part.shape[1], device=states.device, dtype=torch.float64)
    powers = torch.stack([x**n for n in range(4)], dim=-1)  # [T, 4]
    fit = torch.linalg.pinv(powers) @ part.double()  # [layers, 4, hidden]
    slope = torch.stack([torch.zeros_like(x), torch.ones_like(x), 2 * x, 3 * x**2], dim=-1) @ fit
    monotone: Tensor = (slope > 0).all(1) | (slope < 0).all(1)
    return monotone


def roughness(states: Tensor) -> Tensor:
    """Float64[layers, hidden]: squared second differences of the filtered curves, over their squared range."""
    part = states[:, round(0.2 * states.shape[1]) :].double()
    places = torch.arange(WINDOW, device=states.device, dtype=torch.float64) - WINDOW // 2
    kernel = torch.linalg.pinv(torch.stack([places**n for n in range(ORDER + 1)], dim=-1))[0]
    smooth = torch.einsum("lthw,w->lth", part.unfold(1, WINDOW, 1), kernel)
    size = (smooth.amax(1) - smooth.amin(1)).clamp(min=1e-12)
    return smooth.diff(n=2, dim=1).square().sum(1) / size.square()


def candidates(states: Tensor, top: int = 10) -> list[int]:
    """Dimensions that are steady in more than a quarter of the layers, the smoothest first.

    Args:
        states: of :func:`mean_states`.

    Raises:
        MmfixError: the texts are too short, or no dimension is steady.
    """
    layers, tokens, _ = states.shape
    if tokens < LEAST:
        raise MmfixError(f"texts of {tokens} tokens are too short to tell positions; give at least {LEAST}")
    chosen = steady(states)
    often = chosen.sum(0) > layers / 4
    if not bool(often.any()):
        raise MmfixError(
            "no hidden dimension grows or falls steadily along random text, so that none carries position; give longer "
            "or more texts, or use another method"
        )
    rough = torch.where(chosen, roughness(states), 0.0).sum(0) / chosen.sum(0).clamp(min=1)
    order = rough.masked_fill(~often, torch.inf).argsort()
    return [int(d) for d in order[: min(top, int(often.sum()))]]
