"""Decode speed of a whole model: ``python kernels/benchmarks/bench_decode.py --out FOLDER``.

A LLaVA-1.5 of random weights (on CUDA 7B-shaped in bfloat16, on a CPU a small one in float32) generates a fixed number
of tokens with EOS disabled: plain SDPA, `mmfix` with no method (what the machinery costs), and methods by each backend
that serves here. Decode time is the difference of a long and a short generation, so that prefill cancels. Random
weights say nothing about quality; VAR's gate is set to be open so that its edit really acts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bench import provenance, tests_are_green
from timing import percentiles
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mmfix
from mmfix.methods import VAR, VHR
from mmfix_kernels import backends

IMAGE_ID = 5
SHORT = 8


def build(device: torch.device) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's shape on CUDA; on a CPU a quarter of the width and four layers."""
    gpu = device.type == "cuda"
    hidden, inner, layers = (4096, 11008, 32) if gpu else (512, 1376, 4)
    vision = (1024, 4096, 24, 16) if gpu else (128, 256, 3, 4)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, max_position_embeddings=32768,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=vision[0], intermediate_size=vision[1], num_hidden_layers=vision[2],
            num_attention_heads=vision[3], image_size=336, patch_size=14, projection_dim=vision[0],
        ),
        image_token_index=IMAGE_ID, image_seq_length=576, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration, length: int, batch: int, device: torch.device) -> dict[str, Any]:
    """A system prompt, one image of 576 tokens, then text up to `length` tokens."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 32000, (batch, length), generator=random)
    ids[:, 0] = 1
    ids[:, 35 : 35 + 576] = IMAGE_ID
    pixels = torch.randn(batch, 3, 336, 336, generator=random).to(device=device, dtype=model.dtype)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones(batch, length, dtype=torch.long, device=device),
        "pixel_values": pixels,
    }


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """MMFIX_BACKEND for a while."""
    before = os.environ.pop("MMFIX_BACKEND", None)
    if backend:
        os.environ["MMFIX_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("MMFIX_BACKEND", None)
        if before is not None:
            os.environ["MMFIX_BACKEND"] = before


def seconds(model: LlavaForConditionalGeneration, inputs: dict[str, Any], tokens: int) -> float:
    """Wall clock of one greedy generation of exactly `tokens` tokens."""
    gpu = inputs["input_ids"].is_cuda
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def arms(model: Any) -> Iterator[tuple[str, str | None, Callable[[], AbstractContextManager[Any]]]]:
    """Name, forced backend, and what to enter."""
    open_gate = VAR(sink_dims=(0, 1), tau=2.0, min_image_mass=0.0, max_sink_share=1.0)
    yield "vanilla sdpa", None, nullcontext
    usable = [name for name, missing in backends().items() if not missing and name != "reference"]
    for backend in usable:
        yield "mmfix, no method", backend, lambda: mmfix.mitigate(model, None)
        yield "mmfix, var", backend, lambda: mmfix.mitigate(model, open_gate)
        yield "mmfix, vhr", backend, lambda: mmfix.mitigate(model, VHR())


def measure(
    model: Any, inputs: dict[str, Any], enter: Callable[[], AbstractContextManager[Any]], long: int, runs: int
) -> dict[str, float]:
    """Decode seconds per token and prefill seconds (with the first tokens), p20/p50/p80."""
    with torch.inference_mode(), enter():
        seconds(model, inputs, SHORT)
        short = [seconds(model, inputs, SHORT) for _ in range(runs)]
        steps = [(seconds(model, inputs, long) - percentiles(short)[1]) / (long - SHORT) for _ in range(runs)]
    p20, p50, p80 = percentiles(steps)
    return {"p20": p20, "p50": p50, "p80": p80, "runs": runs, "first_tokens_p50": percentiles(short)[1]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tests-passed", action="store_true", help="the caller has just run tests/kernels, all green")
    args = parser.parse_args(argv)
    if not args.tests_passed and not tests_are_green():
        print("the kernel tests are red: nothing is reported", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = build(device)
    shared = provenance(device, 0)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "decode.jsonl").open("a") as file:
        for batch in (1,) if device.type == "cpu" else (1, 8):
            inputs = prompt(model, 640, batch, device)
            vanilla = 0.0
            for name, backend, enter in arms(model):
                record: dict[str, Any] = {"case": f"decode 640 b{batch}", "arm": name, "backend": backend or "sdpa"}
                try:
                    with forced(backend):
                        record |= measure(model, inputs, enter, args.tokens, args.runs)
                except Exception as error:  # one arm that cannot run does not end the others
                    record["unmeasured"] = f"{type(error).__name__}: {str(error)[:200]}"
                else:
                    vanilla = vanilla or record["p50"]
                    record |= {"tokens_per_s": batch / record["p50"], "speed_over_vanilla": vanilla / record["p50"]}
                file.write(json.dumps(record | shared) + "\n")
                file.flush()
                told = record.get("unmeasured") or (
                    f"{record['tokens_per_s']:.1f} tok/s, {record['speed_over_vanilla']:.3f} of vanilla"
                )
                print(f"{record['case']:16} {name:18} {record['backend']:8} {told}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
