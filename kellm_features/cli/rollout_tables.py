"""What the rollout commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from kellm_features.cli.show import plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from kellm_features.store.verification import Verification


def verification_table(verification: Verification) -> Table:
    """The gates of a version, view by view, each with what it measured and the ids that failed it."""
    against = f" against {verification.against}" if verification.against else ""
    failed = sum(not gate.passed for gate in verification.gates)
    verdict = f"{failed} of {len(verification.gates)} gates failed" if failed else "passed"
    table = plain_table(
        f"Verification of {verification.version}{against}: {verdict}",
        ("gate", "left"),
        ("", "left"),
        ("measured", "right"),
        ("accepted", "left"),
    )
    table.add_column("", overflow="fold")
    for view in dict.fromkeys(gate.view for gate in verification.gates):
        table.add_row(Text(view, style="bold", no_wrap=True))
        for gate in verification.gates:
            if gate.view != view:
                continue
            mark = "skipped" if gate.skipped else "passed" if gate.passed else "FAILED"
            about = Text(gate.detail, no_wrap=gate.passed, overflow="ellipsis" if gate.passed else "fold")
            if gate.ids:
                about.append(f"\nids {', '.join(gate.ids)}")
            style = "dim" if gate.skipped else "" if gate.passed else "bold red"
            table.add_row(f"  {gate.name}", mark, gate.value, gate.limit, about, style=style)
    return table
