"""Compile every kernel variant without a GPU and report registers, stack and shared memory.

``python -m mmfix_kernels.triton.compile_report --out kernels/benchmarks/results`` writes ``compile.md``. Run it in a
process of its own: `TRITON_INTERPRET` must not be set. A stack above zero bytes means spilled registers (or a local
array): the default tiles at head width 128 in half precision must have none.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmfix_kernels.call import AttentionCall
from mmfix_kernels.edits import (
    Edit,
    Group,
    HeadScale,
    KeyGroups,
    MapReplacement,
    MassGate,
    MassMove,
    Rows,
    ScoreEdit,
)

GATE = MassGate(group=Group.IMAGE, min_mass=0.2, part=Group.IMAGE_SINK, max_share=0.5)
VAR = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6, rows=Rows.AFTER_IMAGE, gate=GATE)
PAI = ScoreEdit(group=Group.IMAGE, abs_gain=0.5, rows=Rows.LAST)
SECOND = MassMove(source=Group.TEXT_SINK, target=Group.IMAGE_SINK, share=0.2)
EDITS: dict[str, tuple[Edit, ...]] = {
    "plain": (),
    "score edit": (PAI,),
    "mass move": (VAR,),
    "both": (PAI, VAR),
    "two moves": (VAR, SECOND),
    "uniform map": (MapReplacement(kind="uniform"),),
    "reversed map": (MapReplacement(kind="reversed"),),
    "random map": (MapReplacement(kind="random"),),
    "released map": (MapReplacement(kind="random", normalise=False),),
    "shuffled map": (MapReplacement(kind="shuffled"),),
    "move and map": (VAR, MapReplacement(kind="reversed", batch=torch.tensor([False]))),
}
DEFAULTS = ("D 128, bf16", "D 128, fp16")  # these must keep everything in registers
PREFIX = 1024  # keys that branches share
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    """One kernel shape: what is compiled."""

    phase: str  # "prefill", "masked prefill", "bidirectional", "decode" or "shared prefix"
    edits: str = "plain"
    width: int = 128
    dtype: str = "bf16"
    masses: bool = False

    @property
    def name(self) -> str:
        return f"{self.phase}, {self.edits}{' + masses' if self.masses else ''}, D {self.width}, {self.dtype}"


def variants(scope: str = "table") -> Iterator[Variant]:
    """What is compiled: a few (``quick``), the committed ``table``, or ``all`` phases with all edits and widths."""
    if scope == "quick":
        yield from (Variant("prefill", "mass move"), Variant("decode", "mass move"), Variant("prefill", "random map"))
        return
    few = ("plain", "mass move", "random map")
    for edits in EDITS:
        if edits != "shuffled map":
            yield Variant("prefill", edits)
    for edits in EDITS if scope == "all" else ("plain", "mass move", "reversed map"):
        if edits != "shuffled map":
            yield Variant("masked prefill", edits)
    yield Variant("bidirectional", "shuffled map")
    for edits in EDITS if scope == "all" else few:
        if edits != "shuffled map":
            yield Variant("decode", edits)
    for edits in few if scope == "all" else ("mass move",):
        yield Variant("shared prefix", edits)
    yield Variant("prefill", "mass move", masses=True)
    yield Variant("prefill", "mass move", dtype="fp32")
    for width in (32, 64, 80, 96, 256) if scope == "all" else (64, 256):
        yield Variant("prefill", "mass move", width)
    if scope == "all":
        yield Variant("decode", "mass move", masses=True)
        for phase in ("prefill", "decode"):
            yield Variant(phase, "plain", 256)
            yield Variant(phase, "mass move", dtype="fp16")
        for width in (32, 64, 80, 96, 256):
            yield Variant("decode", "mass move", width)


def call_of(variant: Variant) -> AttentionCall:
    """A call on the meta device that asks for the variant; a shared prefix has two branches."""
    length = 1 if variant.phase in ("decode", "shared prefix") else 2048
    branches = 2 if variant.phase == "shared prefix" else 1
    keys, dtype = 2048, DTYPES[variant.dtype]
    before = PREFIX if branches > 1 else 0
    labels = torch.zeros(branches, before + keys, dtype=torch.int8, device="meta")
    after = torch.zeros(branches, length, dtype=torch.bool, device="meta")
    rows = {Rows.ALL: None, Rows.AFTER_IMAGE: None, Rows.LAST: None}
    groups = KeyGroups(
        labels=labels,
        rows=rows if length == 1 else {**rows, Rows.AFTER_IMAGE: after, Rows.LAST: after},
        first=dict.fromkeys(Rows, 0),
    )
    mask = None
    if variant.phase == "masked prefill":
        mask = torch.zeros(1, 1, length, keys, dtype=torch.bool, device="meta")
    scale = HeadScale(scale=torch.ones(32, device="meta"))

    def draw(items: int, heads: int, rows: int) -> torch.Tensor:
        return torch.empty(items, heads, rows, variant.width, dtype=dtype, device="meta")

    return AttentionCall(
        query=draw(branches, 32, length),
        key=draw(branches, 8, keys),
        value=draw(branches, 8, keys),
        prefix_key=draw(1, 8, before) if before else None,
        prefix_value=draw(1, 8, before) if before else None,
        mask=mask,
        is_causal=mask is None and variant.phase != "bidirectional" and before == 0,
        groups=groups,
        edits=(*EDITS[variant.edits], scale),
        masses="all" if variant.masses else "none",
    )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel. `stack` is None where the tool that tells it is not for this target."""

    variant: str
    kernel: str
    target: str
    binary: int
    registers: int | None
    stack: int | None
    shared: int
    error: str = ""


def gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def source_of(kernel: Any, arguments: dict[str, Any], target: Any) -> Any:
    """The kernel with its arguments' types, specialised as a launch would specialise it."""
    from triton.compiler import ASTSource, make_backend

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = make_backend(target).parse_attr("D")
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
    names |= {torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
    for n, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
            attributes[(n,)] = divisible  # allocations are aligned
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(n,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(n,)] = divisible
    return ASTSource(kernel, signature, constants, attributes)


def compile_variant(variant: Variant, target: str) -> list[Compiled]:
    """Compile all kernels of a variant for one target."""
    import triton

    from mmfix_kernels.triton.launch import prepare
    from mmfix_kernels.triton.plan import Plan, make_plan, numbered

    call = call_of(variant)
    plan = make_plan(numbered(call), variant.masses, len(call.edits) - 1)
    assert isinstance(plan, Plan), plan
    out = []
    major = int(target.removeprefix("sm_")) // 10 if target.startswith("sm_") else 9
    for work in prepare(call, plan, major=major)[1]:
        gpu = gpu_target(target)
        base = Compiled(variant.name, work.kernel.__name__, target, 0, None, None, 0)
        try:
            options = {"num_warps": work.warps, "num_stages": work.stages}
            compiled = triton.compile(source_of(work.kernel, work.arguments, gpu), target=gpu, options=options)
        except Exception as error:  # any failure of the compiler is a row of the table, not the end of it
            out.append(replace(base, error=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"))
            continue
        binary = compiled.asm["hsaco" if gpu.backend == "hip" else "cubin"]
        registers, stack = resources(binary) if gpu.backend == "cuda" else (None, None)
        out.append(replace(base, binary=len(binary), registers=registers, stack=stack, shared=compiled.metadata.shared))
    return out


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and stack bytes per thread, read from the cubin by the disassembler that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    fields = dict(field.split(":", 1) for line in text.splitlines() if "REG:" in line for field in line.split())
    return int(fields["REG"]), int(fields["STACK"])


def table(rows: Sequence[Compiled]) -> str:
    """The report as Markdown."""
    import triton

    lines = [
        "# Compiled kernels",
        "",
        f"Compiled without a GPU by Triton {triton.__version__}; generated by "
        "`python -m mmfix_kernels.triton.compile_report`. Registers and stack are per thread (a stack means spills), "
        "shared memory per program, in bytes. Nothing here is a time.",
        "",
        "| variant | kernel | target | registers | stack | shared | binary |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row.variant, row.kernel, row.target]
        if row.error:
            cells += ["did not compile: " + row.error, "", "", ""]
        else:
            known = ["–" if value is None else str(value) for value in (row.registers, row.stack)]
            cells += [*known, str(row.shared), str(row.binary)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, write the table; fail when a default variant of width 128 spills or a CUDA target does not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for compile.md; without it the table is printed")
    parser.add_argument("--scope", choices=("quick", "table", "all"), default="table", help="how many variants")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="sm_80 sm_90 sm_100 gfx942")
    args = parser.parse_args(argv)
    rows = [row for v in variants(args.scope) for target in args.targets for row in compile_variant(v, target)]
    text = table(rows)
    if args.out is None:
        print(text)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "compile.md").write_text(text)
    bad = [r for r in rows if (r.error and r.target != "gfx942") or (r.stack and r.variant.endswith(DEFAULTS))]
    for row in bad:
        print(f"FAILED {row.variant} {row.kernel} {row.target}: {row.error or f'{row.stack} bytes of stack'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
