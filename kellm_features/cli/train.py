"""`kellm train`: the stage, from the newest checkpoint or an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, OutOption, SetOption, run_stage, settings_from

if TYPE_CHECKING:
    from rich.table import Table


@app.command("train")
def train(
    out: OutOption = Path("runs/default"),
    config: ConfigOption = None,
    overrides: SetOption = None,
    from_epoch: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Train on from this epoch's checkpoint; later ones are dropped. 0: from the end of the warm-up where "
            "that is kept, else from the start.",
        ),
    ] = None,
) -> None:
    """Train the adapters jointly with the backbone on CTR and SWING pairs; a killed training goes on where it was."""
    settings = settings_from(config, overrides)
    if from_epoch is None:
        outcome = run_stage("train", settings, out)
    else:
        from kellm_features.training.stage import resuming_from

        with resuming_from(from_epoch):
            outcome = run_stage("train", settings, out, anew=True)
    stdout.print(_epochs(outcome.artifact.file("curves.json")))


def _epochs(path: Path) -> Table:
    """Loss and validation of each epoch, and which one was kept."""
    from kellm_features.cli.show import plain_table

    curves = json.loads(path.read_text(encoding="utf-8"))
    table = plain_table(
        "Epochs",
        ("epoch", "right"),
        ("loss", "right"),
        ("valid AUC", "right"),
        ("valid LogLoss", "right"),
        ("", "left"),
    )
    for row in curves["epochs"]:
        shown = [f"{row[name]:.4f}" for name in ("loss", "valid_auc", "valid_log_loss")]
        table.add_row(f"{row['epoch']:.0f}", *shown, "kept" if row["epoch"] == curves["best_epoch"] else "")
    return table
