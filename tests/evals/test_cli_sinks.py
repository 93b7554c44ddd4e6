"""``mmfix sinks``: the bundled model's sinks as JSON and over the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmfix_decoding.grids import PatchGrid
from mmfix_evals import sinkplot
from mmfix_evals.cli import main


def test_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (96, 96), (90, 160, 30)).save(picture)
    out, plot = tmp_path / "sinks.json", tmp_path / "sinks.svg"
    words = ["sinks", picture, "--dims", "3,50", "--tau", "1.5", "--out", out, "--plot", plot]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "sink dimensions 3, 50, tau 1.5" in printed
    content = json.loads(out.read_text())
    assert [row["layer"] for row in content["layers"]] == list(range(6))
    assert content["sink_dims"] == [3, 50]
    sinks = [sink for row in content["layers"] for sink in row["sinks"]]
    kinds = {sink["kind"] for sink in sinks}
    assert kinds == {"text", "image"}
    assert all(sink["phi"] >= 1.5 and 0 <= sink["received"] <= 1 for sink in sinks)
    assert all((sink["kind"] == "image") == (sink["token"] == "<image>") for sink in sinks)
    svg = plot.read_text()
    assert "layer 5" in svg
    assert "text sinks" in svg
    assert main(["sinks", "--dims", "a"]) == 2
    assert main(["sinks", "--dims", "500"]) == 2  # the model has 192


def test_patches_of_image_tokens() -> None:
    """Tokens after a row (line breaks) have no patch; a tile's patches lie in the tile."""
    found = sinkplot.boxes([PatchGrid(0, 2, 2, skip=1), PatchGrid(6, 1, 2, box=(0.5, 0.0, 1.0, 1.0))])
    assert sorted(found) == [0, 1, 3, 4, 6, 7]
    assert found[3] == (0.0, 0.5, 0.5, 1.0)
    assert found[7] == (0.75, 0.0, 1.0, 1.0)
