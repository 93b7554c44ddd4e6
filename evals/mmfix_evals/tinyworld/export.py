"""Write a TinyWorld split to a folder: ``python -m mmfix_evals.tinyworld.export --split test --images 200 --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmfix_evals.tinyworld.data import write_world
from mmfix_evals.tinyworld.world import SPLITS


def main(argv: list[str] | None = None) -> int:
    """Pictures, COCO instances and captions, POPE question files and a contact sheet."""
    parser = argparse.ArgumentParser(prog="python -m mmfix_evals.tinyworld.export", description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--world-seed", type=int, default=0, help="another number draws a fresh world")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    write_world(args.out, args.split, args.images, args.world_seed)
    print(f"{args.images} pictures of split {args.split} written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
