"""One rank of test_ranks.py: `torchrun rank_cases.py WORLD OUT` trains each case, and the first rank writes to OUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kellm_features.settings import Settings
from kellm_features.training import stage
from kellm_features.training.ranks import Ranks

# Dropout is each rank's own. 56 users' 672 targets: 5 batches of 129 and one of 27, odd numbers all.
SMALL: dict[str, Any] = {
    "hidden": 16,
    "dim": 8,
    "field_dim": 4,
    "top_k": 5,
    "epochs": 2,
    "patience": 0,
    "dropout": 0.0,
    "batch_size": 129,
    "device": "cpu",
}
CASES: dict[str, dict[str, Any]] = {
    "joint, sum": {"schedule": "joint", "reduction": "sum", "weight": 0.004},
    "printed": {"schedule": "joint", "reduction": "sum", "weight": 0.004, "profile": True, "affinity": "none"},
    "pretrain, mean": {"schedule": "pretrain", "warmup_steps": 5, "weight": 0.3},
    "alternating, experts": {"schedule": "alternating", "weight": 0.1, "adapter": "experts"},
    "no contrast": {"sides": "none", "profile": True},
    # 672 = 61 · 11 + 1: one rank has no example of the last batch; workers prepare the others.
    "lone example": {"schedule": "joint", "batch_size": 61, "sides": "item", "profile": True, "workers": 1},
}

RESUMED = "din, bfloat16"
"""Compared with itself, killed and resumed: Dice takes the statistics of each rank's own part."""
RESUMED_OPTIONS: dict[str, Any] = {"backbone": "din", "precision": "bfloat16", "epochs": 3, "dropout": 0.2}


def train(
    world: Path, case: str, ranks: Ranks, checkpoint: Path | None = None, resume_from: int | None = None
) -> dict[str, Any]:
    """Weights and history of one case."""
    options = RESUMED_OPTIONS if case == RESUMED else CASES[case]
    settings = Settings.model_validate({"run": {"seed": 7}, "train": SMALL | options})
    data, encodings, samplers = stage.load_inputs(settings, lambda name, file: world / name / file)
    vectors = {side: encoding.vectors for side, encoding in encodings.items()}
    trainer = stage.fit(
        data,
        vectors,
        samplers,
        settings.train,
        seed=7,
        checkpoint=checkpoint,
        ranks=ranks,
        resume_from=resume_from,
    )
    return {"weights": trainer.model.state_dict(), "history": vars(trainer.history)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks.joined(torch.device("cpu"))
    world = Path(sys.argv[1])
    found = {case: train(world, case, ranks) for case in CASES}
    found[RESUMED] = train(world, RESUMED, ranks, world / "kept")
    found[f"{RESUMED}, resumed"] = train(world, RESUMED, ranks, world / "kept", resume_from=1)
    if ranks.first:
        torch.save(found, sys.argv[2])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
