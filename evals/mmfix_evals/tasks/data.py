"""Where benchmark files lie, which ones are missing, and where they come from.

Everything lies below one folder: that of ``--data``, else ``$MMFIX_DATA``, else ``data`` in the user's cache.
Question files can be downloaded from a pinned revision with ``mmfix eval fetch TASK``; pictures are too large for that
and stay the user's own. Nothing is downloaded unasked.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfix_evals import files
from mmfix_evals.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ENVIRONMENT = "MMFIX_DATA"
MAX_BYTES = 64 << 20
SHOWN = 4


@dataclass(frozen=True)
class Source:
    """One file of a benchmark.

    Attributes:
        path: below the data folder.
        url: pinned to a revision; None for what cannot be had from one address.
        sha256: of the content, where it is known; the revision in the address pins the content otherwise.
        where: for people, where it comes from.
    """

    path: str
    url: str | None = None
    sha256: str | None = None
    where: str = ""

    @property
    def origin(self) -> str:
        return self.where or self.url or ""


def root() -> Path:
    """The data folder: ``$MMFIX_DATA``, else ``data`` in the user's cache of mmfix."""
    given = os.environ.get(ENVIRONMENT)
    return Path(given) if given else files.cache_dir() / "data"


@contextmanager
def below(folder: Path | None) -> Iterator[None]:
    """Look for data below ``folder`` in this process and in those that it starts; None: wherever they were before."""
    if folder is None:
        yield
        return
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = str(folder.resolve())
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def locate(task: str, wanted: Sequence[Source]) -> list[Path]:
    """The files, in order; ``FILE.gz`` will do for ``FILE``.

    Raises:
        DataError: says of every missing file where it belongs and where it comes from.
    """
    found = [_present(root() / source.path) for source in wanted]
    missing = [source for source, path in zip(wanted, found, strict=True) if path is None]
    if missing:
        listed = "; ".join(f"{source.path} ({source.origin})" for source in missing)
        advice = f"run `mmfix eval fetch {task}` or " if all(source.url for source in missing) else ""
        raise DataError(
            f"{task} needs {len(missing)} of its {len(wanted)} files in {root()}: {listed}. To get them, {advice}put "
            f"them there; --data or {ENVIRONMENT} names another folder"
        )
    return [path for path in found if path is not None]


def _present(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return path if path.is_file() else packed if packed.is_file() else None


def need_pictures(task: str, folder: str, names: Sequence[str], origin: str) -> None:
    """Raise DataError unless every picture is in ``folder`` below the data folder."""
    base = root() / folder
    missing = [name for name in dict.fromkeys(names) if not (base / name).is_file()]
    if missing:
        listed = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        raise DataError(
            f"{task}: {len(missing)} of {len(set(names))} pictures are not in {base} ({listed}): unpack {origin} so "
            f"that they lie there; --data or {ENVIRONMENT} names another data folder"
        )


@lru_cache(maxsize=256)
def open_picture(path: Path) -> Image:
    """A picture, RGB, upright. Raises DataError naming the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; check --data or {ENVIRONMENT}") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path}: not a readable picture ({problem}); unpack it again") from None


Opener = Callable[..., Any]


def fetch(wanted: Sequence[Source], opener: Opener = urllib.request.urlopen) -> list[tuple[Source, str, bool]]:
    """Download what is missing.

    Args:
        wanted: files with an address.
        opener: ``urlopen(url, timeout=)``.

    Returns:
        (file, its sha256, whether it was downloaded just now), in order.

    Raises:
        DataError: no connection, a file that is too large, or other content than expected; nothing is kept of it.
    """
    done = []
    for source in wanted:
        path, present = root() / source.path, _present(root() / source.path)
        if present is None:
            content = _download(source, opener)
            files.write_text_atomic(path, content.decode("utf-8"))
        done.append((source, files.sha256(present or path), present is None))
    return done


def _download(source: Source, opener: Opener) -> bytes:
    if not source.url:
        raise DataError(f"{source.path}: cannot be downloaded; get it from {source.origin} and put it into {root()}")
    try:
        with opener(source.url, timeout=60) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as problem:
        raise DataError(f"{source.url}: cannot be downloaded ({problem}); put the file into {root()}") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{source.url}: more than {MAX_BYTES >> 20} MiB; this is not the question file")
    digest = hashlib.sha256(content).hexdigest()
    if source.sha256 is not None and digest != source.sha256:
        raise DataError(f"{source.url}: sha256 {digest}, expected {source.sha256}; the file is not kept")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{source.url}: not UTF-8 text; this is not the question file") from None
    return content
