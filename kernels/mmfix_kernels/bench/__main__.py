"""``python -m mmfix_kernels.bench``: the same as ``mmfix bench kernels``, for machines with torch alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmfix_kernels.bench.measure import default_device, measure_kernels
from mmfix_kernels.bench.record import RedTests


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.jsonl")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of measuring per case and backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests-passed", action="store_true", help="the caller has just run tests/kernels, all green")
    args = parser.parse_args(argv)
    try:
        measure_kernels(args.out, args.device, args.quick, args.budget, args.seed, args.tests_passed)
    except RedTests as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
