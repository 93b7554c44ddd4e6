"""What a mitigation did: backends, fired counts, masses, passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmfix.registry import spec
from mmfix_kernels import Group, Label

if TYPE_CHECKING:
    from mmfix.session import Session

MASS_GROUPS: dict[str, tuple[int, ...]] = {
    "image": Group.IMAGE.labels(),
    "image_sink": Group.IMAGE_SINK.labels(),
    "text": Group.TEXT.labels(),
    "text_sink": Group.TEXT_SINK.labels(),
    "system": Group.SYSTEM.labels(),
    "generated": (int(Label.GENERATED),),
}


@dataclass(frozen=True)
class Fired:
    """How often a method's edits changed something.

    Args:
        fired: (prompt, head, row) places that were changed.
        considered: places that were looked at.
    """

    fired: int
    considered: int

    @property
    def share(self) -> float | None:
        """fired / considered; None when nothing was looked at."""
        return self.fired / self.considered if self.considered else None


@dataclass(frozen=True)
class LayerReport:
    """Backend of one layer, why a preferred one did not serve it, and how often it was called."""

    layer: int
    backend: str
    reason: str
    calls: int


@dataclass(frozen=True)
class Report:
    """What happened since ``mitigate()`` was entered.

    Args:
        methods: name and parameters of each method, in order.
        fired: method name → :class:`Fired`, over all layers.
        fired_by_layer: method name → one :class:`Fired` per layer.
        layers: one :class:`LayerReport` per layer.
        masses: mean attention mass of the newest token by group, or None without telemetry.
        prompts: prompts processed.
        passes_per_token: rows per prompt row, all in one batch (a short text-only prefill is listed under
            `extra_prefills` and not counted here).
        extra_prefills: text-only prefills run.
        notes: what the user should know, such as a method that never fired.
        calibrated: method name → which of its values were calibrated for this model, and on what data.
    """

    methods: list[dict[str, Any]]
    fired: dict[str, Fired]
    fired_by_layer: dict[str, list[Fired]]
    layers: list[LayerReport]
    masses: dict[str, float] | None
    prompts: int
    passes_per_token: float
    extra_prefills: int
    notes: list[str]
    calibrated: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "methods": self.methods,
            "fired": {
                name: {"fired": f.fired, "considered": f.considered, "share": f.share} for name, f in self.fired.items()
            },
            "fired_by_layer": {name: [f.share for f in rows] for name, rows in self.fired_by_layer.items()},
            "layers": [vars(layer) for layer in self.layers],
            "masses": self.masses,
            "prompts": self.prompts,
            "passes_per_token": self.passes_per_token,
            "extra_prefills": self.extra_prefills,
            "notes": self.notes,
            "calibrated": self.calibrated,
        }


def build(session: Session) -> Report:
    """The report of a session, up to now."""
    names = [m.info.name for m in session.methods]
    table = [[0, 0] for _ in names]
    by_layer: list[list[Fired]] = [[] for _ in names]
    for state in session.layers:
        counts = state.fired.tolist() if state.fired is not None else [[0, 0] for _ in names]
        for n, (fired, considered) in enumerate(counts):
            table[n][0] += fired
            table[n][1] += considered
            by_layer[n].append(Fired(fired, considered))
    if session.steering is not None and session.steering.tower_fired is not None:
        for n, (fired, considered) in enumerate(session.steering.tower_fired.tolist()):
            table[n][0] += fired
            table[n][1] += considered
    if session.mixed is not None:
        changed, seen = session.mixed.tolist()
        table[session.mix_owner][0] += changed
        table[session.mix_owner][1] += seen
    passes = 1.0 if session.expander is None else float(session.expander.rows.count)
    if session.search is not None:
        for n, count in enumerate(session.search.counts):
            table[session.search.owner][n] += count
        passes = session.search.passes
    fired = {name: Fired(*row) for name, row in zip(names, table, strict=True)}
    notes = list(session.notes)
    if session.prompts:
        notes += [f"{name} never fired: the output is the plain model's" for name, f in fired.items() if not f.fired]
    masses = named_masses(session)
    return Report(
        methods=[spec(m) for m in session.methods],
        fired=fired,
        fired_by_layer=dict(zip(names, by_layer, strict=True)),
        layers=[LayerReport(s.layer, s.backend, s.reason, s.calls) for s in session.layers],
        masses=None if masses is None else {name: float(value.mean()) for name, value in masses.items()},
        prompts=session.prompts,
        passes_per_token=passes,
        extra_prefills=session.extra_passes,
        notes=notes,
        calibrated=session.calibrated,
    )


def named_masses(session: Session) -> dict[str, Tensor] | None:
    """Float32[B] per group: mass of the newest token, mean over layers and heads; None when nothing was measured."""
    if session.mass_sum is None:
        return None
    mean = session.mass_sum / session.mass_layers
    return {name: mean[:, list(labels)].sum(-1) for name, labels in MASS_GROUPS.items()}
