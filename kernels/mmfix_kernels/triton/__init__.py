"""Grouped attention in Triton: one streaming kernel for prefill and decode. Triton is imported on the first use."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mmfix_kernels.call import Attended, AttentionCall
from mmfix_kernels.edits import MapReplacement
from mmfix_kernels.triton.plan import Plan, make_plan, numbered

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256


def interpreted() -> bool:
    """Whether the interpreter was asked for, by both variables: kernels then run on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("MMFIX_BACKEND") == "triton"


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@lru_cache(maxsize=8)
def _old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def unusable() -> str:
    """Why no call at all can be served here; "" when some can."""
    if not installed():
        return "triton is not installed (pip install 'mmfix[triton]')"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    return ""


def why_not(call: AttentionCall) -> str:
    """Why the kernels cannot serve the call; "" when they can."""
    if reason := unusable():
        return reason
    if any(isinstance(edit, MapReplacement) for edit in call.edits):
        return "the kernel replaces no maps"
    if call.prefix_key is not None:
        return "the kernel reads no shared prefix"
    if any(getattr(edit, "batch", None) is not None for edit in call.edits):
        return "the kernel selects no batch rows"
    query, key, value = call.query, call.key, call.value
    if query.device.type != "cuda" and not interpreted():
        return "no CUDA device holds the tensors"
    if query.device.type == "cuda" and _old(query.device):
        return "compute capability below 8.0"
    if call.softcap is not None:
        return "the kernel has no soft cap on scores"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: one of float16, bfloat16, float32 for all three"
    if max(query.shape[3], value.shape[3]) > MAX_WIDTH:
        return f"head width {max(query.shape[3], value.shape[3])} above {MAX_WIDTH}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "the kernel has no backward pass"
    plan = plan_of(call)
    return "" if isinstance(plan, Plan) else plan


def attend(call: AttentionCall) -> Attended:
    """Serve one call."""
    plan = plan_of(call)
    assert isinstance(plan, Plan), plan
    from mmfix_kernels.triton.launch import attend as launch  # imports Triton

    return launch(call, plan)[0]


def attend_with_peak(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Plain attention in float32 [B, H, L, D] and the largest weight of each row [B, H, L, 1]; edits are ignored."""
    from mmfix_kernels.triton.launch import attend as launch

    bare = replace(call, edits=(), masses="none")
    attended, stats = launch(bare, Plan(), stats=True, dtype=torch.float32)
    assert stats is not None
    return attended.output, stats[..., 1:]


def plan_of(call: AttentionCall) -> Plan | str:
    """The kernel shape of the call, or why there is none."""
    scales = call.head_scales
    return make_plan(numbered(call), call.masses != "none", scales[0][0] if scales else None)
