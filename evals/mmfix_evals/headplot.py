"""A layer × head map as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmfix.heads import HeadMap
from mmfix_evals import files
from mmfix_evals.errors import MissingDependency

STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "mmfix", "font.size": 9}


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure; no display and no global state is touched."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise MissingDependency(
            f"maps are drawn with matplotlib, which cannot be imported ({problem}); run: pip install 'mmfix[eval]'"
        ) from None
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: Path) -> None:
    """Write a figure; SVG text stays text and the file is the same each time."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(drawn).print_svg(buffer, metadata={"Date": None})
    files.write_text_atomic(path, buffer.getvalue())


def draw(found: HeadMap, path: Path) -> None:
    """The map as an SVG: first layer at the bottom; scores of both signs around white."""
    layers, heads = found.shape
    drawn = figure(max(3.6, 1.9 + 0.22 * heads), max(2.6, 1.2 + 0.18 * layers))
    axis = drawn.subplots()
    most = max(max(map(max, found.values)), -min(map(min, found.values)), 1e-12)
    signed = min(map(min, found.values)) < 0
    shown = axis.imshow(
        found.values, origin="lower", aspect="auto", cmap="RdBu_r" if signed else "cividis",
        vmin=-most if signed else 0, vmax=most,
    )  # fmt: skip
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    step = max(1, heads // 8), max(1, layers // 8)
    axis.set_xticks(range(0, heads, step[0]))
    axis.set_yticks(range(0, layers, step[1]))
    needle = found.settings.get("needle")
    axis.set_title(f"{found.score}{f' ({needle})' if needle else ''}: {Path(found.model).name}, n = {found.prompts}")
    drawn.colorbar(shown, ax=axis)
    save(drawn, path)
