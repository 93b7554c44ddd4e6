"""``mmfix-app``: serve the demo."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from mmfix_app.limits import Limits


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="mmfix-app",
        description="Serve the demo: a plain and a mitigated answer side by side. Example: mmfix-app --model tiny",
    )
    found.add_argument("--model", default="tiny", help="'tiny' (bundled), a local model folder, or a hub id")
    found.add_argument("--host", default="127.0.0.1", help="address to listen on; 127.0.0.1 is this machine only")
    found.add_argument("--port", type=int, default=None, help="port; a free one from 7860 on by default")
    found.add_argument("--share", action="store_true", help="open a public tunnel through gradio's servers")
    found.add_argument("--mcp", action="store_true", help="also be an MCP server that offers describe_image")
    found.add_argument("--runs", type=Path, action="append", default=[], help="a run folder, or a folder of them")
    found.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    found.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    return found


def private(folder: Path) -> None:
    """Keep gradio to itself: files in `folder`, no analytics, no settings from the environment that would share."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_MCP_SERVER"):
        os.environ.pop(name, None)


def launch(
    model: str = "tiny", host: str = "127.0.0.1", port: int | None = None, *, share: bool = False, mcp: bool = False,
    runs: list[Path] | None = None, device: str = "auto", dtype: str = "auto", block: bool = True, quiet: bool = False,
    limits: Limits | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """Load the model and serve the app; the running app and its address.

    Raises:
        MmfixError: the model cannot be served.
        MissingDependency: `mcp`, and the package of that name is absent or unfit.
    """
    if mcp:
        need_mcp()  # before the model is loaded
    from mmfix_app.service import Service
    from mmfix_decoding import Decoder

    limits = limits or Limits()
    service = Service(Decoder.from_pretrained(model, device=device, dtype=dtype), limits)
    folder = Path(tempfile.mkdtemp(prefix="mmfix-app-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    private(folder)  # before gradio is imported
    import gradio as gr

    from mmfix_app import ui, widgets

    demo = ui.build(service, model, runs or [], mcp=mcp)
    demo.queue(max_size=limits.waiting, default_concurrency_limit=1, status_update_rate="auto")
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="gray", font=sans, font_mono=mono, radius_size="md")
    _, address, _ = demo.launch(
        server_name=host, server_port=port, share=share, mcp_server=mcp, max_file_size=limits.upload_bytes,
        max_threads=16, ssr_mode=False, enable_monitoring=False, strict_cors=True, show_error=True, quiet=quiet,
        footer_links=["api"], run_history=False, prevent_thread_lock=not block, inbrowser=False, theme=theme,
        css=(widgets.ASSETS / "app.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    return demo, address


def need_mcp() -> None:
    """Refuse where the MCP package is absent or of a version that gradio 6 is not written for."""
    from mmfix_evals.errors import MissingDependency

    install = "run, in an environment of its own: pip install 'gradio[mcp]'"
    try:
        found = metadata.version("mcp")
    except metadata.PackageNotFoundError:
        raise MissingDependency(f"--mcp needs the package mcp, which is not installed; {install}") from None
    if not found.startswith("1."):
        raise MissingDependency(f"--mcp needs mcp 1, and mcp {found} is installed; {install}")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 stopped by the user, 1 the work failed, 2 wrong usage."""
    given = parser().parse_args(argv)
    from mmfix.errors import MmfixError, UsageError
    from mmfix_evals.errors import MissingDependency

    if importlib.util.find_spec("gradio") is None:
        print("mmfix-app: gradio is not installed; run: pip install 'mmfix[app]'", file=sys.stderr)
        return 1
    try:
        if given.port is not None and not 1 <= given.port <= 65535:
            raise UsageError(f"--port {given.port}: give a number from 1 to 65535")
        launch(
            given.model, given.host, given.port, share=given.share, mcp=given.mcp, runs=given.runs,
            device=given.device, dtype=given.dtype,
        )  # fmt: skip
    except UsageError as error:
        print(f"mmfix-app: {error}", file=sys.stderr)
        return 2
    except (MmfixError, MissingDependency, OSError) as error:
        print(f"mmfix-app: {error}", file=sys.stderr)
        return 1
    return 0
