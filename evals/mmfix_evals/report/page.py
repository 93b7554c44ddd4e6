"""The page: every text through Jinja's autoescape, every picture inside, no address of anything outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmfix_evals import length_table, machine, tables
from mmfix_evals.errors import MissingDependency
from mmfix_evals.report.browser import groups
from mmfix_evals.report.plots import all_plots
from mmfix_evals.report.source import Reported

TEMPLATE = "page.html.j2"


def html(runs: Sequence[Reported], title: str = "mmfix report", baseline: str = "greedy", pictures: bool = True) -> str:
    """The report as one HTML document.

    Args:
        runs: of :func:`mmfix_evals.report.read`.
        title: heading.
        baseline: the method that the others are shown beside.
        pictures: show small pictures where their task finds them.

    Raises:
        MissingDependency: jinja2 or matplotlib is not installed.
    """
    from markupsafe import Markup

    plots = all_plots(runs)
    found = groups(runs, baseline, pictures)
    return str(
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            columns=tables.COLUMNS,
            matched_columns=length_table.COLUMNS,
            runs=[_run(run) for run in runs],
            # Matplotlib has escaped what it was given; everything else on the page is escaped by the template.
            plots=[{**vars(plot), "svg": Markup(plot.svg)} for plot in plots],
            groups=found,
            pairs=[pair for group in found for pair in group.pairs],
            tasks=sorted({group.task for group in found}),
            methods=list(dict.fromkeys(group.method for group in found)),
            baseline=baseline,
        )
    )


def _run(run: Reported) -> dict[str, Any]:
    results = run.results
    return {
        "label": run.label,
        "sections": tables.sections(results, every_metric=False),
        "full": tables.sections(results, every_metric=True),
        "notes": tables.footnotes(results),
        "matched": length_table.sections(results.get("length_matched") or []),
        "matched_notes": length_table.footnotes(results.get("length_matched") or []),
        "facts": facts(results),
        "status": results["status"],
    }


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What the numbers depend on, as (name, value)."""
    git, model = results.get("git") or {}, results["model"]
    data = [f"{name}: {entry['data']['documents_sha256'][:16]}" for name, entry in results["tasks"].items()]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items() if value)
    revision = f"{git['revision'][:12]}{' with changes' if git.get('dirty') else ''}" if git.get("revision") else ""
    listed = [
        ("command", " ".join(results["argv"])),
        ("model", f"{model['id']} {model.get('revision') or ''} {(model.get('sha256') or '')[:16]}".strip()),
        ("data sha256", "; ".join(data)),
        ("machine", machine.describe(results["machine"])),
        ("versions", versions),
        ("mmfix revision", revision),
        ("started", str(results["timing"].get("started", ""))),
        ("status", results["status"]),
    ]
    return [(name, value) for name, value in listed if value]


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as problem:
        raise MissingDependency(
            f"the page is written with jinja2, which cannot be imported ({problem}); run: pip install 'mmfix[eval]'"
        ) from None
    return Environment(
        loader=PackageLoader("mmfix_evals.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
