"""One rank of test_losses.py's distributed cases: `python ranks.py RANK WORLD FOLDER` writes what it saw to FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kellm_features.training.adapter import Adapter
from kellm_features.training.losses import AdapterInfoNCE

WORLD, B, N, D = 2, 5, 3, 8
FULL = ("x_neg", "anchor_ids", "positive_ids", "negative_ids", "log_q", "sample_weight")
IDS = ("x_neg", "anchor_ids", "positive_ids", "negative_ids")

# name -> options of the loss, names of what it is given, adapter.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "plain": ({}, (), "adapter"),
    "full_mean": ({"margin": 0.3}, FULL, "adapter"),
    "full_sum": ({"reduction": "sum", "symmetric": True, "margin": 0.3}, FULL, "sequential"),
    "symmetric_mean": ({"symmetric": True}, FULL, "adapter"),
    "rows": ({"reduction": "none", "symmetric": True}, IDS, "adapter"),
    "short_log_q": ({}, ("x_neg", "short_log_q"), "adapter"),
    "called": ({"symmetric": True}, FULL, "hooked"),
    "compiled": ({"symmetric": True}, FULL, "adapter"),
    "checkpointed": ({}, FULL, "adapter"),
    "wrapped": ({"symmetric": True}, FULL, "sequential"),
}


def batch(rank: int | None) -> dict[str, Tensor]:
    """One rank's part, or all of it with columns in the order that is promised."""
    generator = torch.Generator().manual_seed(7)
    x, x_pos = torch.randn(2, WORLD * B, D, dtype=torch.float64, generator=generator)
    x_pos = x_pos + x  # positives resemble
    log_q = -3 * torch.rand(WORLD * (B + N), dtype=torch.float64, generator=generator)
    whole = {
        "x": x,
        "x_pos": x_pos,
        "x_neg": torch.randn(WORLD * N, D, dtype=torch.float64, generator=generator),
        # Across ranks: rows 1 and 6 have one anchor, 2 and 8 one positive; 3's positive is 9's anchor.
        "anchor_ids": torch.tensor([0, 1, 2, 3, 4, 5, 1, 7, 8, 9]),
        "positive_ids": torch.tensor([10, 11, 12, 9, 14, 15, 16, 17, 12, 19]),
        # A negative of rank 1 is an anchor of rank 0, one of rank 0 a positive of rank 1.
        "negative_ids": torch.tensor([30, 15, 32, 33, 4, 35]),
        "log_q": log_q,
        "short_log_q": log_q[: WORLD * B],
        "sample_weight": torch.rand(WORLD * B, dtype=torch.float64, generator=generator) + 0.1,
    }
    if rank is None:
        return whole
    mine = {name: value.chunk(WORLD)[rank] for name, value in whole.items()}
    positives, negatives = log_q.split([WORLD * B, WORLD * N])
    mine["log_q"] = torch.cat([positives.chunk(WORLD)[rank], negatives.chunk(WORLD)[rank]])
    return mine


class Model(nn.Module):
    """What a trainer wraps: the adapter and the loss, whose temperature learns."""

    def __init__(self, kind: str, gather: bool, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.adapter: nn.Module
        if kind == "adapter":
            self.adapter = Adapter(D, 16, 8)
            self.adapter.standardize(batch(None)["x"])
        else:
            self.adapter = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 8))
        if kind == "hooked":
            self.adapter.register_forward_hook(lambda _module, _inputs, output: output / 2)
        self.loss = AdapterInfoNCE(temperature=torch.tensor(0.5), gather=gather, **options)
        self.double()

    def forward(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = self.loss(self.adapter, **given)
        return out


def choose(given: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name.removeprefix("short_"): given[name] for name in ("x", "x_pos", *names)}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.mean().backward()
    return {name.replace("module.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_case(name: str, rank: int) -> dict[str, Any]:
    options, names, kind = CASES[name]
    given = choose(batch(rank), names)
    inner = Model(kind, True, options)
    model: nn.Module = inner
    if name == "wrapped":  # it is called, and the loss's temperature is nobody's to average
        inner.adapter = nn.parallel.DistributedDataParallel(inner.adapter)
    elif name == "compiled":
        model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    else:
        model = nn.parallel.DistributedDataParallel(inner)
    if name == "checkpointed":
        loss, z, _ = checkpoint(model, given, use_reentrant=False)
    else:
        loss, z, _ = model(given)
    grads = gradients(inner, loss)
    for key, grad in grads.items():
        if name == "compiled" or (name == "wrapped" and key == "loss.temperature"):
            dist.all_reduce(grad)
            grad /= WORLD
    return {"loss": loss.detach(), "z": z.detach(), "grads": grads}


def refusals(rank: int) -> dict[str, str]:
    """Messages of calls that have to raise on every rank, and must not hang."""
    given = batch(rank)
    loss, adapter = AdapterInfoNCE(gather=True), Adapter(D, 16, 8).double()
    uneven = {name: given[name][: B - rank] for name in ("x", "x_pos")}
    lonely = choose(given, ("sample_weight",) if rank == 0 else ())
    said = {}
    for name, arguments in (("uneven", uneven), ("lonely", lonely)):
        try:
            loss(adapter, **arguments)
        except ValueError as error:
            said[name] = str(error)
    return said


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    results: dict[str, Any] = {name: run_case(name, rank) for name in CASES}
    results["refusals"] = refusals(rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
