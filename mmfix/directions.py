"""Steering directions of one model (VTI, arXiv:2410.15778): found on a few pictures, kept in a file with provenance.

The file is safetensors, ``mmfix-vti.safetensors`` in the model's own folder or one in the user's cache (written by
``mmfix calibrate vti``). It names the shapes of the model that it was made with, and is refused by any other.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from mmfix import calibration
from mmfix.errors import MethodError, MmfixError
from mmfix.families import Family, describe
from mmfix.parts import Part, Parts
from mmfix.steering import tower_layers
from mmfix.storage import write_bytes

FILE = "mmfix-vti.safetensors"
Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Directions:
    """What ``mmfix calibrate vti`` found.

    Args:
        text: Float32[layers, hidden], from invented to truthful captions; None without captions.
        vision: Float32[tower layers, tokens or 1, width], from pictures to their masked copies; None when not asked.
        facts: provenance: how many pictures, pairs and masks, the seed, the prompt, hash of the data, versions.
        identity: name and hash of the file that they were read from.
    """

    text: Tensor | None
    vision: Tensor | None
    facts: dict[str, Any] = field(default_factory=dict)
    identity: str = ""


def first_component(differences: Tensor) -> Tensor:
    """Float32[..., D] of differences [..., N, D]: their mean plus the unit vector along which they vary most.

    That is what the released code of VTI steers along (PCA of rank one). The component's sign makes its largest score
    positive; differences that are all alike (or one alone) have their mean.
    """
    x = differences.float()
    mean = x.mean(-2)
    centred = x - mean[..., None, :]
    values, vectors = torch.linalg.eigh(centred @ centred.transpose(-1, -2))  # [..., N, N]: N is small, D is not
    scores = vectors[..., -1]
    largest = scores.gather(-1, scores.abs().argmax(-1, keepdim=True))
    component = torch.einsum("...nd,...n->...d", centred, scores * largest.sign())
    spread = values[..., -1:] > 1e-10 * x.square().sum((-1, -2))[..., None]
    return mean + torch.where(spread, torch.nn.functional.normalize(component, dim=-1), 0.0)


def text_direction(
    family: Family,
    pairs: Iterable[tuple[Batch, Batch]],
    progress: Callable[[int], None] = lambda done: None,
    parts: Parts | None = None,
) -> tuple[Tensor, int]:
    """Float32[layers, hidden] and the number of pairs.

    Args:
        pairs: inputs of a prompt with a truthful answer and of the same prompt with an invented one, one row each.
        progress: told the pairs done.
        parts: what an earlier call with the same pairs left; None keeps nothing.
    """
    parts = Parts() if parts is None else parts
    found: list[Tensor] = []
    for number, pair in enumerate(pairs):
        found.append(parts.get(f"text-{number:05d}", partial(_told, family, *pair))["difference"])
        progress(1)
    if not found:
        raise MmfixError("no pairs of captions to calibrate on; give at least one")
    return first_component(torch.stack(found)).view(family.num_layers, -1), len(found)


def _told(family: Family, truthful: Batch, invented: Batch) -> Part:
    good, bad = (torch.cat([s[0, -1] for s in outputs(family.whole, family.layers, b)]) for b in (truthful, invented))
    return {"difference": good - bad}


def vision_direction(
    family: Family,
    pictures: Iterable[Batch],
    trials: int = 50,
    share: float = 0.99,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    parts: Parts | None = None,
) -> Tensor:
    """Float32[tower layers, tokens, width]: from the states of a picture to the mean of those of masked copies.

    One token, the mean over all of them, stands for a tower that packs pictures of any size in one row.

    Args:
        pictures: inputs with ``pixel_values`` of one picture each.
        trials: masked copies of each; share: patches that are masked in a copy, by the picture's mean.
        progress: told the pictures done.
        parts: what an earlier call with the same pictures and numbers left; None keeps nothing.
    """
    layers = tower_layers(family)
    parts = Parts() if parts is None else parts
    generator = torch.Generator().manual_seed(seed)

    def difference(picture: Batch) -> Part:
        plain = _looked(family, layers, picture)
        total = torch.zeros_like(plain)
        for _ in range(trials):
            pixels = masked(family, picture["pixel_values"], share, generator)
            total += _looked(family, layers, {**picture, "pixel_values": pixels})
        return {"difference": total / trials - plain, "generator": generator.get_state()}

    found: list[Tensor] = []
    for number, picture in enumerate(pictures):
        part = parts.get(f"vision-{number:05d}", partial(difference, picture))
        generator.set_state(part["generator"])  # a part of an earlier call drew its masks too
        found.append(part["difference"])
        progress(1)
    if not found:
        raise MmfixError("no pictures to calibrate on; give at least one")
    if len({tuple(one.shape) for one in found}) > 1 or found[0].shape[1] > _LONGEST:
        found = [one.mean(1, keepdim=True) for one in found]
    count, tokens, width = found[0].shape
    directions = [first_component(torch.stack([one[:, t].flatten() for one in found])) for t in range(tokens)]
    return torch.stack([one.view(count, width) for one in directions], dim=1)


_LONGEST = 1024  # patches beyond which each having a direction of its own is a file of hundreds of megabytes


def masked(family: Family, pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pixels [..., 3, H, W] with `share` of the patches at their channel's mean; packed patches [N, D] likewise."""
    if pixels.ndim < 3:
        gone = torch.randperm(len(pixels), generator=generator)[: int(share * len(pixels))].to(pixels.device)
        changed = pixels.clone()
        changed[gone] = pixels.mean(0)
        return changed
    size = getattr(getattr(family.tower, "config", None), "patch_size", 14)
    size = size[-1] if isinstance(size, (tuple, list)) else int(size)
    down, across = pixels.shape[-2] // size, pixels.shape[-1] // size
    gone = torch.zeros(down * across, dtype=torch.bool)
    gone[torch.randperm(down * across, generator=generator)[: int(share * down * across)]] = True
    squares = gone.view(down, across).repeat_interleave(size, 0).repeat_interleave(size, 1)
    mask = torch.zeros(pixels.shape[-2:], dtype=torch.bool)
    mask[: down * size, : across * size] = squares
    return torch.where(mask.to(pixels.device), pixels.mean((-1, -2), keepdim=True), pixels)


def _looked(family: Family, layers: tuple[nn.Module, ...], given: Batch) -> Tensor:
    """Float32[tower layers, tokens, width] of one picture; tiles are averaged."""
    base = family.whole if family.outer is not None else family.model.base_model
    encode = getattr(base, "get_image_features", family.tower)
    known = inspect.signature(getattr(encode, "forward", encode)).parameters
    states = outputs(encode, layers, {name: given[name] for name in known if name in given})
    return torch.stack([s.flatten(0, -3).mean(0) if s.ndim > 2 else s for s in states])


def outputs(call: Any, layers: tuple[nn.Module, ...], batch: Batch) -> list[Tensor]:
    """Float32: what each layer gives during one call, without gradients."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().float())

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        call(**batch)
    return found


def save(model: Any, found: Directions, folder: Path | None = None) -> Path:
    """Write directions to the user's cache, or into a model `folder`; returns the file."""
    path = _cache_file(model) if folder is None else folder / FILE
    kept = {"text": found.text, "vision": None if found.vision is None else found.vision.half()}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in kept.items() if tensor is not None}
    facts = {**found.facts, "fingerprint": _fingerprint(describe(model))}
    return write_bytes(path, to_bytes(tensors, {"mmfix": json.dumps(facts)}))


def load(family: Family, path: str | None = None) -> Directions:
    """The directions of a model: those in the file (or folder) `path`, in the model's folder, or in the user's cache.

    Raises:
        MethodError: there are none, they are not readable, or they belong to another model.
    """
    model = family.whole
    name = calibration.model_name(model)
    cached = _cache_file(model)
    places = (Path(name) / FILE, cached) if path is None else (Path(path), Path(path) / cached.name)
    file = next((p for p in places if p.is_file()), None)
    again = f"run `mmfix calibrate vti --model {name}`"
    if file is None:
        where = "" if path is None else f" in {path!r}"
        raise MethodError(
            f"vti needs steering directions of {name!r} and there are none{where}; {again}, or give vti.directions"
        )
    try:
        with safe_open(file, "pt") as content:
            facts = json.loads((content.metadata() or {}).get("mmfix", "null"))
            tensors = {key: content.get_tensor(key).float() for key in content.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise MethodError(f"{file} is not a readable file of directions ({error}); {again}") from error
    if not isinstance(facts, dict) or not set(tensors) <= {"text", "vision"}:
        raise MethodError(f"{file} does not hold directions of mmfix; {again}")
    if facts.get("fingerprint") != _fingerprint(family):
        raise MethodError(f"{file} was made with another model than {name!r}; {again}, or give vti.directions")
    identity = f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    return Directions(tensors.get("text"), tensors.get("vision"), facts, identity)


def _fingerprint(family: Family) -> list[Any]:
    """Shapes of language model and tower."""
    tower = getattr(family.tower, "config", None)
    width = getattr(tower, "hidden_size", None)
    return [*family.fingerprint, getattr(tower, "model_type", None), width, len(family.tower_attentions)]


def _cache_file(model: Any) -> Path:
    return calibration._cache_file(model).with_suffix(".vti.safetensors")
