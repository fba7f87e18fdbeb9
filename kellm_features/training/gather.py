"""InfoNCE over the batches of all ranks: what is gathered, and what each rank's loss means."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kellm_kernels import info_nce_shard


def world_size() -> int:
    """Ranks of the default process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "gather=True without a process group: call torch.distributed.init_process_group first, "
            "or pass gather=False for the negatives of this process alone"
        )
    return dist.get_world_size()


def check_sizes(device: torch.device, **given: Tensor | None) -> None:
    """Raise ValueError, on every rank alike, unless each tensor has as many rows on all ranks or is None on all.

    One small collective, whose result is waited for: ranks that differ would hang in a larger one, or mix up rows.
    """
    rows = torch.tensor([-1 if tensor is None else len(tensor) for tensor in given.values()], device=device)
    table = gather_rows(rows, dist.get_rank(), dist.get_world_size()).view(-1, len(given)).T.tolist()
    odd = {name: sizes for name, sizes in zip(given, table, strict=True) if len(set(sizes)) > 1}
    if odd:
        seen = "; ".join(
            f"{name}: {', '.join('none' if size < 0 else str(size) for size in sizes)}" for name, sizes in odd.items()
        )
        raise ValueError(
            f"gather=True, and rows by rank differ in {seen}. All ranks must pass the same options and as many rows: "
            "drop the last, smaller batch (drop_last=True) or pad it"
        )


def info_nce_over_ranks(
    anchor: Tensor,
    positive: Tensor,
    *,
    negatives: Tensor | None,
    temperature: Tensor | float,
    anchor_ids: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    log_q: Tensor | None,
    sample_weight: Tensor | None,
    margin: float | None,
    symmetric: bool,
    reduction: str,
    impl: str,
) -> Tensor:
    """This rank's part of `kellm_kernels.info_nce` over the concatenated batches of all ranks, sizes being equal.

    The average over ranks of what this returns is the loss of the whole batch, for `mean` and for `sum`, and the
    average over ranks of its gradients, which is what DistributedDataParallel leaves, is the gradient of that loss. For
    `none` it returns this rank's rows, whose mean follows the same rule. Backward is a collective too: every rank must
    run it.

    Args:
        anchor: (B, E), this rank's.
        positive: (B, E), likewise; likewise all tensors that follow, as `info_nce` describes them.
        negatives: likewise.
        temperature: as in `info_nce`, the same on all ranks; likewise what is not named here.
        anchor_ids: likewise.
        positive_ids: likewise.
        negative_ids: likewise.
        log_q: (B,) or (B + N,).
        sample_weight: (B,).
        margin: likewise.
        symmetric: likewise.
        reduction: likewise.
        impl: likewise.
    """
    rank, world, rows = dist.get_rank(), dist.get_world_size(), len(anchor)

    def gathered(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else gather_rows(tensor, rank, world)

    anchor_ids, positive_ids = gathered(anchor_ids), gathered(positive_ids)
    if log_q is not None:  # all positives come first, then all negatives
        log_q = torch.cat([gather_rows(part, rank, world) for part in (log_q[:rows], log_q[rows:])])
    weighted_mean = reduction == "mean" and sample_weight is not None
    shared: dict[str, Any] = {
        "start": rank * rows,
        "temperature": temperature,
        "sample_weight": sample_weight,
        "margin": margin,
        "reduction": "sum" if weighted_mean else reduction,
        "impl": impl,
    }
    loss = info_nce_shard(
        anchor,
        gather_rows(positive, rank, world),
        negatives=gathered(negatives),
        anchor_ids=anchor_ids,
        positive_ids=positive_ids,
        negative_ids=gathered(negative_ids),
        log_q=log_q,
        **shared,
    )
    if symmetric:
        others = gather_rows(anchor, rank, world)
        loss = (loss + info_nce_shard(positive, others, anchor_ids=positive_ids, positive_ids=anchor_ids, **shared)) / 2
    if weighted_mean and sample_weight is not None:
        total = gather_rows(sample_weight.sum(dtype=loss.dtype).view(1), rank, world).sum()
        return loss * torch.where(total == 0, 0, world / total)
    return loss * world if reduction == "sum" else loss


@torch.library.custom_op("kellm_features::gather_rows", mutates_args=())
def gather_rows(rows: Tensor, rank: int, world: int) -> Tensor:
    """(R, ...) of each rank -> (W·R, ...) by rank, on all; a gradient sums over ranks what each has of this one's rows.

    An operator, so that `torch.compile` leaves it alone.
    """
    out = rows.new_empty(world * len(rows), *rows.shape[1:])
    if len(rows) > 0:
        # all_gather_into_tensor warns from PyTorch 2.13 on, and what follows it is not in 2.11.
        dist.all_gather(list(out.chunk(world)), rows.contiguous())
    return out


@torch.library.custom_op("kellm_features::sum_rows", mutates_args=())
def sum_rows(grad: Tensor, rank: int, world: int) -> Tensor:
    """(W·R, ...) of each rank -> the sum over ranks of this one's (R, ...)."""
    # An all-reduce moves twice what a reduce-scatter would, whose two names are deprecated in PyTorch 2.13 and not yet
    # in 2.11. Not in bf16, where sums over many ranks would lose digits.
    total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
    dist.all_reduce(total)
    return total.chunk(world)[rank].to(grad.dtype, copy=True)


@gather_rows.register_fake
def _(rows: Tensor, rank: int, world: int) -> Tensor:
    return rows.new_empty(world * len(rows), *rows.shape[1:])


@sum_rows.register_fake
def _(grad: Tensor, rank: int, world: int) -> Tensor:
    return grad.new_empty(len(grad) // world, *grad.shape[1:])


def _setup(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.place = inputs[1:]


def _gather_rows_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return sum_rows(grad, *ctx.place), None, None


gather_rows.register_autograd(_gather_rows_grad, setup_context=_setup)
