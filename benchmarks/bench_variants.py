"""What `bench_adapter_info_nce.py` compares: the project's implementations, PyTorch's own, and what peers there are.

A variant is built for one `Problem` and gives a function (anchors, positives) -> loss. Two operations are measured:
`adapter_info_nce` takes frozen encodings (B, D) through the adapter to the loss and has gradients on the four weights;
`info_nce` takes unit embeddings (B, E) and has gradients on both. With `directions` 2 the loss is the mean of both.
What all of them are held to is `true_values`, in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kellm_kernels import adapter_info_nce, info_nce

TEMPERATURE = 0.03
OPS = ("adapter_info_nce", "info_nce")
Loss = Callable[[Tensor, Tensor], Tensor]
CUDA_MINI_BATCH, CPU_MINI_BATCH = 1024, 256  # of Cached MNRL, whose default of 32 is for transformers, not for MLPs
CUDA_CHUNK, CPU_CHUNK = 1 << 26, 1 << 20  # logits that `chunked` holds at once: 256 and 4 MiB in float32
CUDA_BLOCK, CPU_BLOCK = 1 << 29, 1 << 22  # logits that the truth holds at once: 4 GiB and 32 MiB in float64
SMALL = 4096  # rows up to which launches weigh: CUDA adds wall clock and graphs
CHECKS = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (2e-2, 0.15),
}  # tolerance of the loss, and of the gradients' norm


@dataclass(frozen=True)
class Shape:
    """B rows, D encoder dim, H hidden, E embedding dim."""

    rows: int
    encoder: int
    hidden: int
    embedding: int


@dataclass
class Problem:
    """One operation at one shape on one device, with a small pool of random inputs."""

    op: str
    shape: Shape
    directions: int
    device: torch.device
    dtype: torch.dtype
    pool_size: int
    weights: list[nn.Parameter] = field(init=False)
    pool: list[tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        generator = torch.Generator(self.device).manual_seed(s.rows)

        def uniform(fan_in: int, *size: int) -> nn.Parameter:
            drawn = torch.rand(*size, generator=generator, device=self.device)
            return nn.Parameter((drawn * 2 - 1) / fan_in**0.5)  # nn.Linear's own initialisation

        self.weights = [
            uniform(s.encoder, s.hidden, s.encoder),
            uniform(s.encoder, s.hidden),
            uniform(s.hidden, s.embedding, s.hidden),
            uniform(s.hidden, s.embedding),
        ]
        width = s.encoder if self.op == "adapter_info_nce" else s.embedding
        self.pool = []
        for _ in range(self.pool_size):
            anchors = torch.randn(s.rows, width, generator=generator, device=self.device)
            noise = torch.randn(s.rows, width, generator=generator, device=self.device)
            positives = 0.4 * anchors + 0.9 * noise  # near 0.4 in cosine: no loss is near 0
            if self.op == "info_nce":
                anchors, positives = functional.normalize(anchors, dim=1), functional.normalize(positives, dim=1)
            ask = self.op == "info_nce"  # encodings are frozen
            self.pool.append((anchors.to(self.dtype).requires_grad_(ask), positives.to(self.dtype).requires_grad_(ask)))

    def leaves(self, index: int) -> list[Tensor]:
        """The tensors whose gradients a training step on inputs `index` wants."""
        return list(self.weights) if self.op == "adapter_info_nce" else list(self.pool[index])

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """How a trainer runs it: bf16 autocast over float32 weights on CUDA, plain float32 on the CPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def embed(self, x: Tensor) -> Tensor:
        """The adapter in plain PyTorch, or the embeddings themselves."""
        if self.op == "info_nce":
            return x
        w1, b1, w2, b2 = self.weights
        return functional.normalize(functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2), dim=-1)


class NotHereError(Exception):
    """This variant cannot run here; the message says why."""


def build(impl: str, problem: Problem) -> Loss:
    """The loss function of one variant.

    Raises:
        NotHereError: a peer that is not installed, or that does not do what the problem asks.
    """
    return _BUILDERS[impl](problem)


def _ours(impl: str) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        if impl == "triton" and problem.device.type != "cuda":
            raise NotHereError("needs CUDA")
        symmetric = problem.directions == 2

        def whole(x: Tensor, x_pos: Tensor) -> Tensor:
            w1, b1, w2, b2 = problem.weights
            return adapter_info_nce(x, x_pos, w1, b1, w2, b2, temperature=TEMPERATURE, symmetric=symmetric, impl=impl)[
                0
            ]

        def alone(anchor: Tensor, positive: Tensor) -> Tensor:
            return info_nce(anchor, positive, temperature=TEMPERATURE, symmetric=symmetric, impl=impl)

        return whole if problem.op == "adapter_info_nce" else alone

    return make


def _eager(problem: Problem) -> Loss:
    target = torch.arange(problem.shape.rows, device=problem.device)

    def loss(x: Tensor, x_pos: Tensor) -> Tensor:
        logits = problem.embed(x) @ problem.embed(x_pos).T / TEMPERATURE
        forward = functional.cross_entropy(logits, target)
        return forward if problem.directions == 1 else (forward + functional.cross_entropy(logits.T, target)) / 2

    return loss


def _chunked(problem: Problem) -> Loss:
    rows = problem.shape.rows
    step = max(1, (CUDA_CHUNK if problem.device.type == "cuda" else CPU_CHUNK) // rows)
    targets = torch.arange(rows, device=problem.device).split(step)

    def block(q: Tensor, k: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(q @ k.T / TEMPERATURE, target, reduction="sum")

    def one(q: Tensor, k: Tensor) -> Tensor:
        sums = [
            checkpoint(block, part, k, target, use_reentrant=False, preserve_rng_state=False)
            for part, target in zip(q.split(step), targets, strict=True)
        ]
        return torch.stack(sums).sum() / rows

    def loss(x: Tensor, x_pos: Tensor) -> Tensor:
        q, k = problem.embed(x), problem.embed(x_pos)
        return one(q, k) if problem.directions == 1 else (one(q, k) + one(k, q)) / 2

    return loss


def _compiled(mode: str | None) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        if mode == "reduce-overhead":
            if problem.device.type != "cuda":
                raise NotHereError("CUDA graphs need CUDA")
            if problem.shape.rows > SMALL:
                raise NotHereError(f"up to B = {SMALL} alone: its graphs keep (B, B) buffers while the others run")
        if problem.device.type == "cuda":
            logits = problem.shape.rows**2 * problem.dtype.itemsize
            memory = torch.cuda.get_device_properties(problem.device).total_memory
            if logits > memory:  # known before it compiles for a while
                sizes = f"{logits / 2**30:.0f} GiB, and the device has {memory / 2**30:.0f}"
                raise NotHereError(f"out of memory: its product writes (B, B) logits, {sizes}")
        return torch.compile(_eager(problem), dynamic=False, mode=mode)

    return make


class _Encoder(nn.Sequential):
    """What sentence-transformers asks of a model: features in, `sentence_embedding` out. No tokenizer.

    It does not normalise: `cos_sim` does. Autocast is entered here as well, as accelerate wraps a model's forward,
    because Cached MNRL embeds again within backward.
    """

    def __init__(self, problem: Problem) -> None:
        if problem.op == "info_nce":
            super().__init__(nn.Identity())
        else:
            s = problem.shape
            super().__init__(
                nn.Linear(s.encoder, s.hidden, device="meta"),
                nn.GELU(),
                nn.Linear(s.hidden, s.embedding, device="meta"),
            )
            self[0].weight, self[0].bias, self[2].weight, self[2].bias = problem.weights
        self.problem = problem

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.problem.autocast():
            return {"sentence_embedding": super().forward(features["encoding"])}


def _sentence_transformers(cached: bool) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        try:
            from sentence_transformers import util
            from sentence_transformers.sentence_transformer import losses
        except ImportError as error:
            raise NotHereError(f"sentence-transformers is not installed ({error})") from error
        similarity = util.cos_sim if problem.op == "adapter_info_nce" else util.dot_score  # embeddings are unit already
        options: dict[str, Any] = {"scale": 1 / TEMPERATURE, "similarity_fct": similarity}
        if problem.directions == 2:
            options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        if cached:
            options["mini_batch_size"] = CUDA_MINI_BATCH if problem.device.type == "cuda" else CPU_MINI_BATCH
        kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
        criterion = kind(_Encoder(problem), **options)
        labels = torch.empty(0, device=problem.device)  # in its signature, and unused

        def loss(x: Tensor, x_pos: Tensor) -> Tensor:
            value: Tensor = criterion([{"encoding": x}, {"encoding": x_pos}], labels)
            return value

        return loss

    return make


def _inf_cl(problem: Problem) -> Loss:
    if problem.device.type != "cuda":
        raise NotHereError("needs CUDA")
    try:
        from inf_cl import cal_flash_loss
    except ImportError as error:
        raise NotHereError(f"inf_cl is not installed ({error}); a wheel in --wheels DIR will do") from error

    def one(q: Tensor, k: Tensor) -> Tensor:
        # What cal_inf_loss comes to on one process, but for its all-reduce of the scale's gradient.
        rows: Tensor = cal_flash_loss(q, k, scale=1 / TEMPERATURE, head_dim=problem.shape.embedding)
        return rows.mean()

    def loss(x: Tensor, x_pos: Tensor) -> Tensor:
        q, k = problem.embed(x).contiguous(), problem.embed(x_pos).contiguous()
        return one(q, k) if problem.directions == 1 else (one(q, k) + one(k, q)) / 2

    return loss


def _memeff(problem: Problem) -> Loss:
    if problem.device.type != "cuda":
        raise NotHereError("needs CUDA")
    if problem.directions == 1:
        raise NotHereError("its loss with gradients on both sides has two directions; see the rows with directions 2")
    try:
        from memeff import MemoryEfficientCLIPLoss
    except ImportError as error:
        raise NotHereError(f"memeff is not installed ({error}); a wheel in --wheels DIR will do") from error
    criterion = MemoryEfficientCLIPLoss(temperature=TEMPERATURE, normalized_inputs=True, stable=False)

    def loss(x: Tensor, x_pos: Tensor) -> Tensor:
        # Its kernels take any dtype, and tensor cores want bf16: what autocast's normalize gives is float32.
        value: Tensor = criterion(problem.embed(x).to(problem.dtype), problem.embed(x_pos).to(problem.dtype))
        return value

    return loss


_BUILDERS: dict[str, Callable[[Problem], Loss]] = {
    "ours_triton": _ours("triton"),
    "ours_torch": _ours("torch"),
    "eager": _eager,
    "chunked": _chunked,
    "compile": _compiled(None),
    "compile_reduce_overhead": _compiled("reduce-overhead"),
    "st_mnrl": _sentence_transformers(cached=False),
    "st_cached_mnrl": _sentence_transformers(cached=True),
    "inf_cl": _inf_cl,
    "memeff": _memeff,
}
IMPLS = tuple(_BUILDERS)


class Values(NamedTuple):
    """A loss and the gradients of `Problem.leaves`."""

    loss: float
    gradients: list[Tensor]


class Errors(NamedTuple):
    """How far off: |loss − truth| / |truth|, and the norm of all gradients' error together over that of the truth."""

    loss: float = 0.0
    gradients: float = 0.0


def true_values(problem: Problem, index: int, block_elements: int | None = None) -> Values:
    """Loss and gradients of inputs `index`, in float64 from those very inputs, without a variant's code.

    Logits are there a block of rows at a time. With the softmax P of Q·Kᵀ/τ over columns, the gradients of the mean
    loss are dQ = (P − I)·K / (τB) and dK = (P − I)ᵀ·Q / (τB); autograd takes them through the adapter.

    Args:
        problem: op, directions and inputs.
        index: of the pool's inputs.
        block_elements: logits of a block at most, but a row at least; None: by device.
    """
    if block_elements is None:
        block_elements = CUDA_BLOCK if problem.device.type == "cuda" else CPU_BLOCK
    weights = [weight.detach().double().requires_grad_() for weight in problem.weights]
    sides = [x.detach().double() for x in problem.pool[index]]
    if problem.op == "adapter_info_nce":
        w1, b1, w2, b2 = weights
        sides = [functional.gelu(x @ w1.T + b1) @ w2.T + b2 for x in sides]
        sides = [z / z.norm(dim=1, keepdim=True) for z in sides]
    (q, k), (dq, dk) = (z.detach() for z in sides), (torch.zeros_like(z) for z in sides)
    total = 0.0
    for anchors, columns, d_anchors, d_columns in ((q, k, dq, dk), (k, q, dk, dq))[: problem.directions]:
        step = max(1, block_elements // len(columns))
        for start in range(0, len(anchors), step):
            rows = slice(start, start + step)
            p = torch.softmax(anchors[rows] / TEMPERATURE @ columns.T, dim=1)
            own = p.diagonal(start)
            total -= float(own.log().sum())
            own -= 1
            d_anchors[rows] += p @ columns
            d_columns += p.T @ anchors[rows]
    terms = problem.shape.rows * problem.directions
    gradients = [dz / (TEMPERATURE * terms) for dz in (dq, dk)]
    if problem.op == "adapter_info_nce":
        gradients = list(torch.autograd.grad(sides, weights, gradients))
    return Values(total / terms, gradients)


def check(problem: Problem, index: int, loss: Tensor, truth: Values) -> Errors:
    """How far a loss, and the gradients that its backward left on the leaves of `index`, are from the truth.

    Raises:
        ValueError: further than `CHECKS` allows, or a gradient is missing.
    """
    tolerance, grad_tolerance = CHECKS[problem.dtype]
    value = float(loss.detach())
    if not abs(value - truth.loss) <= tolerance * (1 + abs(truth.loss)):
        raise ValueError(f"loss {value:.6g}, expected {truth.loss:.6g}: not timed")
    apart = 0.0
    for leaf, wanted in zip(problem.leaves(index), truth.gradients, strict=True):
        if leaf.grad is None:
            raise ValueError("a gradient is missing: not timed")
        apart += float((leaf.grad.double() - wanted).square().sum())
    error = (apart / sum(float(wanted.square().sum()) for wanted in truth.gradients)) ** 0.5
    if not error <= grad_tolerance:
        raise ValueError(f"gradients off by {error:.2g} of their norm: not timed")
    return Errors(abs(value - truth.loss) / abs(truth.loss), error)
