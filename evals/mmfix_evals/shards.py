"""Stateless shards: worker i of n answers every n-th batch of one fixed list; files are merged afterwards.

Nothing is exchanged between workers and no process group is made, so any number of them may run, die and be repeated,
in any order and on any machine. Whole batches are dealt out, not single documents: every batch is then the same one
as in an unsharded run, and with it the last digit of half-precision answers and the fired counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmfix_evals.errors import UsageError

T = TypeVar("T")
_FOLDER = re.compile(r"shard-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Shard:
    """Worker ``index`` (from 0) of ``count``."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UsageError(
                f"--shard {self.index}/{self.count}: give i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4, 3/4"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def part(self, items: Sequence[T]) -> list[T]:
        """Items ``index, index + count, …``."""
        return list(items[self.index :: self.count])

    def folder(self, out: Path) -> Path:
        """Where this worker writes: ``out`` itself, or a folder of its own below it."""
        return out if self.is_whole else out / f"shard-{self.index}-of-{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"`` → worker 2 of 8, counted from 0."""
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
        if not found:
            raise UsageError(f"--shard {text!r}: give i/n with i from 0 to n - 1, such as 0/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def find(cls, option: str | None, environment: Mapping[str, str]) -> Shard:
        """``--shard``, else RANK and WORLD_SIZE as set by ``torchrun`` and ``accelerate launch``, else the whole.

        Raises:
            UsageError: a malformed option, or a WORLD_SIZE above 1 without a RANK below it.
        """
        if option is not None:
            return cls.parse(option)
        size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
        if size in ("", "1"):
            return cls()
        if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
            raise UsageError(
                f"WORLD_SIZE={size!r} and RANK={rank!r} in the environment name no worker: start with torchrun or "
                "accelerate launch, or give --shard i/n"
            )
        return cls(int(rank), int(size))


def shard_folders(folder: Path) -> list[Path]:
    """The shard folders directly below ``folder``, by number; ``folder`` itself where it has none."""
    found = [(match, path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    found.sort(key=lambda pair: (int(pair[0][2]), int(pair[0][1])))
    return [path for _, path in found] or [folder]


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of ``size``; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
