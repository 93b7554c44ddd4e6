"""``python -m mmfix_kernels.bench``: the same as ``mmfix bench kernels``, for machines with torch alone."""

from __future__ import annotations

from collections.abc import Sequence

from mmfix_kernels.bench.measure import default_device, measure_kernels
from mmfix_kernels.bench.record import command_line, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, "kernels.jsonl", default_device())
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of measuring per case and backend")
    parser.add_argument("--only", default="", help="cases whose name begins with this text, such as decode")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = (args.out, args.device, args.quick, args.budget, args.seed)
    options = {"limit": args.limit, "only": args.only, "tests_passed": args.tests_passed}
    return exit_code(lambda: measure_kernels(*sizes, **options))


if __name__ == "__main__":
    raise SystemExit(main())
