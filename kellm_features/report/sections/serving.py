"""The version that the run published: whether it is served, and what the gates measured."""

from __future__ import annotations

from dataclasses import dataclass

from kellm_features.report.view import RunView
from kellm_features.store.verification import Gate, Verification


@dataclass(frozen=True)
class Published:
    """A published version and its gates, by view."""

    version: str
    promoted: bool
    rows: tuple[tuple[str, int], ...]
    """(view, ids served)."""
    against: str | None
    """The version that was served then, None where there was none."""
    gates: tuple[tuple[str, tuple[Gate, ...]], ...]
    """(view, its gates); empty where the version was not held against them."""


def published(view: RunView) -> Published:
    """What the manifest of `publish` says."""
    notes = view.artifact("publish").manifest.notes
    found = Verification.model_validate(notes["gates"]) if notes.get("gates") else None
    names = dict.fromkeys(gate.view for gate in found.gates) if found else {}
    gates = tuple((name, tuple(gate for gate in found.gates if gate.view == name)) for name in names) if found else ()
    return Published(
        version=str(notes.get("version", "")),
        promoted=bool(notes.get("promoted")),
        rows=tuple(notes.get("rows", {}).items()),
        against=found.against if found else None,
        gates=gates,
    )
