"""Grouped attention in Triton: one streaming kernel for prefill and decode. Triton is imported on the first use."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

from mmfix_kernels.call import HEAD_EDITS, Attended, AttentionCall
from mmfix_kernels.edits import Rows
from mmfix_kernels.keyed import KEYED
from mmfix_kernels.triton.plan import Plan, conflict, make_plan, numbered

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


def unfit(device: torch.device) -> str:
    """Why the kernels serve no call on a device; "" when they serve some."""
    if reason := unusable():
        return reason
    if device.type != "cuda" and not interpreted():
        return "no CUDA device holds the tensors"
    if device.type == "cuda" and _old(device):
        return "compute capability below 8.0"
    return ""


def why_not(call: AttentionCall) -> str:
    """Why the kernels cannot serve the call; "" when they can."""
    query, key, value = call.query, call.key, call.value
    # A compiled decoding step does not ask the machine again: the prompt before it did.
    if not torch.compiler.is_compiling() and (reason := unfit(query.device)):
        return reason
    if call.softcap is not None:
        return "the kernel has no soft cap on scores"
    if call.prefix_key is not None and call.prefix_key.dtype != query.dtype:
        return f"dtypes {query.dtype} and, of the shared prefix, {call.prefix_key.dtype}"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: one of float16, bfloat16, float32 for all three"
    if max(query.shape[3], value.shape[3]) > MAX_WIDTH:
        return f"head width {max(query.shape[3], value.shape[3])} above {MAX_WIDTH}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "the kernel has no backward pass"
    if any(isinstance(edit, KEYED) for edit in call.edits):
        return "an edit names single keys or mixes heads"
    if call.head_selects or any(edit.mean_abs_gain for _, edit in call.score_edits):
        return "an edit compares heads, and a program of the kernel holds one"
    if call.splits:
        return "a softmax per part of the keys"
    if any(not isinstance(edit, HEAD_EDITS) and edit.rows is Rows.GENERATED for edit in call.edits):
        return "an edit of generated tokens alone"
    plan = plan_of(call)
    return conflict(call) if isinstance(plan, Plan) else plan


def attend(call: AttentionCall) -> Attended:
    """Serve one call."""
    plan = plan_of(call)
    assert isinstance(plan, Plan), plan
    from mmfix_kernels.triton.launch import attend as launch  # imports Triton

    return launch(call, plan)[0]


def plan_of(call: AttentionCall) -> Plan | str:
    """The kernel shape of the call, or why there is none."""
    scales = call.head_scales
    return make_plan(numbered(call), call.masses != "none", scales[0][0] if scales else None)
