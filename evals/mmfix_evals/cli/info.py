"""``mmfix methods`` and ``mmfix doctor``."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

METHODS_EXAMPLE = "Example: mmfix methods --json"
DOCTOR_EXAMPLE = "Example: mmfix doctor"
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Import name → (what it is for, how to get it).
OPTIONAL = {
    "pycocotools": ("COCO annotation folders as CHAIR ground truth", "pip install 'mmfix[eval]'"),
    "gradio": ("the demo application", "pip install 'mmfix[app]'"),
    "optuna": ("mmfix tune", "pip install 'mmfix[tune]'"),
    "ray": ("evaluation on several GPUs through Ray", "pip install 'mmfix[ray]'"),
    "triton": ("the GPU kernels", "pip install 'mmfix[triton]'"),
}


def methods_command(
    as_json: JSON = False,
    table: Annotated[bool, typer.Option("--table", help="A Markdown table, with the families each runs on.")] = False,
) -> None:
    """List the methods: paper, kind, cost, parameters."""
    from mmfix.registry import methods

    listed = [method_entry(info) for info in methods().values()]
    if as_json:
        typer.echo(json.dumps(listed, indent=1, ensure_ascii=False, default=str))
        return
    from mmfix_evals import method_pages, tables

    if table:
        typer.echo(method_pages.table(method_pages.families()))
        return

    rows = [
        tables.Row((e["name"], e["title"], e["paper"], e["kind"], f"{e['passes']:g}", "yes" if e["trained"] else "no"))
        for e in listed
    ]
    console = tables.console_for(sys.stdout)
    columns = ("method", "title", "paper", "kind", "passes", "trained in paper")
    tables.print_sections(console, [tables.Section("", rows)], columns)
    typer.echo("passes: forward passes per generated token. Parameters:")
    for entry in listed:
        for name, field in entry["params"].items():
            typer.echo(f"  {entry['name']}:{name}={_value(field['default'])}   {field['help']}{_range(field)}")


def method_entry(info: Any) -> dict[str, Any]:
    """What is known of a method, as JSON."""
    return {
        "name": info.name,
        "title": info.title,
        "paper": info.paper,
        "kind": info.kind,
        "passes": info.passes,
        "trained": info.trained_in_paper,
        "params": {
            name: {"default": one.default, "help": one.help, "low": one.low, "high": one.high}
            for name, one in info.params.items()
        },
    }


def _value(value: Any) -> str:
    return json.dumps(value, default=str)


def _range(field: dict[str, Any]) -> str:
    if field["low"] is None and field["high"] is None:
        return ""
    low, high = ("" if field[end] is None else f"{field[end]:g}" for end in ("low", "high"))
    return f" (from {low or '-inf'} to {high or 'inf'})"


def doctor_command(as_json: JSON = False) -> None:
    """Versions, devices, backends, what is missing and how to get it. Exit code 1 when something needed is missing."""
    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _print(found)
    if found["problems"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    typer.echo("versions")
    for name, version in found["versions"].items():
        typer.echo(f"  {name:<14} {version or 'missing'}")
    typer.echo("devices")
    for device in found["devices"]:
        typer.echo(f"  {device['name']:<14} {device['detail']}")
    typer.echo("backends")
    for name, reason in found["backends"].items():
        typer.echo(f"  {name:<14} {reason or 'usable'}")
    typer.echo("optional packages")
    for name, entry in found["optional"].items():
        state = "found" if entry["found"] else f"missing: {entry['purpose']}; {entry['install']}"
        typer.echo(f"  {name:<14} {state}")
    typer.echo(f"bundled models    {', '.join(found['bundled_models']) or 'none: reinstall mmfix'}")
    typer.echo(f"calibrations      {found['calibration_folder']}")
    for problem in found["problems"]:
        typer.echo(f"problem: {problem}")
    if not found["problems"]:
        typer.echo("everything needed is there")


def diagnose() -> dict[str, Any]:
    """What ``mmfix doctor`` prints, as JSON. Something missing is reported, never raised."""
    from mmfix_evals import machine

    versions = machine.versions()
    problems = [f"{name} is not installed: pip install mmfix" for name, version in versions.items() if not version]
    found: dict[str, Any] = {
        "versions": versions,
        "executable": Path(sys.executable).name,
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": [],
        "backends": {},
        "optional": {
            name: {"found": importlib.util.find_spec(name) is not None, "purpose": purpose, "install": install}
            for name, (purpose, install) in OPTIONAL.items()
        },
        "bundled_models": [],
        "calibration_folder": None,
        "problems": problems,
    }
    for part in (_devices, _backends, _models, _calibration):
        try:
            part(found)
        except Exception as problem:  # a broken installation is what this command is for
            problems.append(f"{part.__name__.strip('_')}: {type(problem).__name__}: {problem}")
    if not found["bundled_models"] and "models" not in " ".join(problems):
        problems.append("the bundled model 'tiny' is missing: reinstall mmfix, or give --model a folder or hub id")
    return found


def _devices(found: dict[str, Any]) -> None:
    import torch

    from mmfix_evals import machine

    detail = f"{machine.cpu_model()}, {machine.cores()} cores, {torch.get_num_threads()} threads"
    found["devices"].append({"name": "cpu", "detail": detail})
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        detail = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
        found["devices"].append({"name": f"cuda:{index}", "detail": detail})


def _backends(found: dict[str, Any]) -> None:
    from mmfix_kernels import attention

    found["backends"] = dict(attention.backends())


def _models(found: dict[str, Any]) -> None:
    import mmfix_decoding

    found["bundled_models"] = sorted(mmfix_decoding.bundled())


def _calibration(found: dict[str, Any]) -> None:
    from mmfix import calibration

    found["calibration_folder"] = str(calibration.cache_folder())
