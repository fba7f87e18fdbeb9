"""What kernels/README.md says of other losses: the same value and the same gradients as their own code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kellm_kernels import adapter_info_nce, adapter_mlp, info_nce

from .oracle import needs_triton

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def migration(title: str) -> tuple[str, str]:
    """The code before and the code after, under the README's heading that starts with `title`."""
    found = re.findall(
        rf"^### {re.escape(title)}.*?```python\n(.*?)# after\n(.*?)```", README.read_text("utf-8"), re.M | re.S
    )
    assert len(found) == 1
    before, after = found[0]
    return before, after


def loss_of(code: str, names: dict[str, Any]) -> Tensor:
    scope = {"torch": torch, "functional": functional, "info_nce": info_nce, **names}
    exec(code, scope)
    loss = scope["loss"]
    assert isinstance(loss, Tensor)
    return loss


def assert_equal(loss: Tensor, wanted: Tensor, leaves: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients of every leaf, in float64: the order of sums is all that may differ."""
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    wanted_grads = torch.autograd.grad(wanted, leaves)
    for grad, wanted_grad in zip(torch.autograd.grad(loss, leaves), wanted_grads, strict=True):
        assert bool(wanted_grad.any())
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-12)


def draw(*shape: int, seed: int = 0, cosine: float = 0.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random unit vectors, `shape[0]` sets of them: all but the first lean by `cosine` towards the first."""
    sets = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sets = functional.normalize(sets, dim=-1)
    sets[1:] = functional.normalize(cosine * sets[0] + (1 - cosine**2) ** 0.5 * sets[1:], dim=-1)
    return [vectors.to(dtype).requires_grad_() for vectors in sets]


# Hand-written


def test_hand_written() -> None:
    before, after = migration("A hand-written InfoNCE")
    anchor, positive = ((7 * vectors).detach().requires_grad_() for vectors in draw(2, 200, 64, cosine=0.5))
    names = {"anchor": anchor, "positive": positive}
    assert_equal(loss_of(after, names), loss_of(before, names), (anchor, positive))


def test_hand_written_in_both_directions() -> None:
    anchor, positive = draw(2, 130, 48, cosine=0.5)
    logits, own = anchor @ positive.T / 0.03, torch.arange(130)
    wanted = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    loss = info_nce(anchor, positive, temperature=0.03, symmetric=True)
    assert_equal(loss, wanted, (anchor, positive))


# sentence-transformers


class Tower(nn.Module):
    """The last module of a sentence-transformers model, fed with encodings instead of tokens."""

    def __init__(self, adapt: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.adapt = adapt  # a module among them is registered, and its parameters with it

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": self.adapt(features["encoding"])}


def sentence_model(adapt: Callable[[Tensor], Tensor]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(modules=[Tower(adapt)], device="cpu")


def ranking_loss(adapt: Callable[[Tensor], Tensor], columns: Iterable[Tensor], **options: Any) -> Tensor:
    """`MultipleNegativesRankingLoss` of sentence-transformers, from encodings: anchors, positives, negatives."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    features = [{"encoding": column} for column in columns]
    loss = MultipleNegativesRankingLoss(sentence_model(adapt), **options)(features, torch.empty(0))
    assert isinstance(loss, Tensor)
    return loss


def two_layers() -> tuple[nn.Sequential, tuple[Tensor, ...]]:
    """An adapter as people write it, 32 → 48 → 40, and its weights."""
    torch.manual_seed(0)
    adapter = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 40)).double()
    return adapter, tuple(adapter.parameters())


def encodings(rows: int, *, columns: int) -> list[Tensor]:
    return [vectors.detach() for vectors in draw(columns, rows, 32, cosine=0.6)]


def test_ranking_loss() -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    before, after = migration("sentence-transformers: MultipleNegativesRankingLoss")
    adapter, weights = two_layers()
    names = {
        "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
        "model": sentence_model(adapter),
        "features": [{"encoding": column} for column in encodings(120, columns=3)],
        "labels": torch.empty(0),
    }
    assert_equal(loss_of(after, names), loss_of(before, names), weights)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard_columns", [0, 1, 2])
def test_ranking_loss_over_an_adapter(hard_columns: int, symmetric: bool) -> None:
    """The whole of it in one call; each row sees the hard negatives of all, in the first direction only."""
    adapter, weights = two_layers()
    x, x_pos, *hard = encodings(90, columns=2 + hard_columns)
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    wanted = ranking_loss(adapter, (x, x_pos, *hard), scale=25.0, directions=directions, partition_mode="per_direction")
    loss, _, _ = adapter_info_nce(
        x, x_pos, *weights, x_neg=torch.cat(hard) if hard else None, temperature=1 / 25, symmetric=symmetric
    )
    assert_equal(loss, wanted, weights)


def test_ranking_loss_against_the_other_anchors_too() -> None:
    """Their `query_to_query` in a joint softmax: anchors are negatives, and one's own is masked by its id."""
    adapter, weights = two_layers()
    x, x_pos = encodings(90, columns=2)
    wanted = ranking_loss(adapter, (x, x_pos), directions=("query_to_doc", "query_to_query"), partition_mode="joint")
    z, z_pos, ids = adapter_mlp(x, *weights), adapter_mlp(x_pos, *weights), torch.arange(90)
    loss = info_nce(z, z_pos, negatives=z, anchor_ids=ids, negative_ids=ids, temperature=1 / 20)
    assert_equal(loss, wanted, weights)


def test_ranking_loss_by_dot_products() -> None:
    from sentence_transformers.util import dot_score

    adapter, weights = two_layers()
    x, x_pos = encodings(90, columns=2)
    wanted = ranking_loss(adapter, (x, x_pos), similarity_fct=dot_score, scale=3.0)
    loss, _, _ = adapter_info_nce(x, x_pos, *weights, normalize=False, temperature=1 / 3)
    assert_equal(loss, wanted, weights)


# open_clip


@pytest.fixture(scope="module")
def clip_loss() -> type[nn.Module]:
    """`open_clip.loss.ClipLoss` from the file itself: importing the package asks for torchvision and timm."""
    path = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", str(path))
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: type[nn.Module] = module.ClipLoss
    return loss


def clip_leaves(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text features, and the logarithm of the scale, which starts at a temperature of 0.07 as CLIP's does."""
    image, text = draw(2, rows, 64, cosine=0.4)
    return image, text, torch.tensor(1 / 0.07, dtype=torch.float64).log().requires_grad_()


def test_clip_loss(clip_loss: type[nn.Module]) -> None:
    """The learnable scale included."""
    before, after = migration("open_clip: ClipLoss")
    leaves = clip_leaves(150)
    names = dict(zip(("image_features", "text_features", "logit_scale"), leaves, strict=True))
    assert_equal(loss_of(after, names), loss_of(before, {**names, "ClipLoss": clip_loss}), leaves)


def test_clip_loss_with_a_bias(clip_loss: type[nn.Module]) -> None:
    """The same number on every logit cancels, here as there."""
    image, text, scale = clip_leaves(64)
    wanted = clip_loss()(image, text, scale.exp(), logit_bias=-10.0)
    loss = info_nce(image, text, temperature=torch.exp(-scale), symmetric=True)
    assert_equal(loss, wanted, (image, text, scale))


# Inf-CL


class Case(NamedTuple):
    """A loss by Inf-CL: code that leaves `loss`, and the tensors it names, whose floating ones take gradients."""

    code: str
    names: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.names.values() if tensor.is_floating_point()]


class Result(NamedTuple):
    """What Inf-CL made of a case."""

    case: Case
    loss: Tensor
    grads: Sequence[Tensor]


INF_CL = '''
import sys

import torch
import triton.language as tl


def round_to_tf32(assembly, constraints, args, **rest):
    """What the one instruction in Inf-CL's backward does: nearest, ties away from zero, 13 bits off the fraction."""
    if assembly != "cvt.rna.tf32.f32 $0, $1;":
        raise ValueError(f"no other instruction is spelled out here: {assembly}")
    bits = args[0].to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


tl.inline_asm_elementwise = round_to_tf32
from inf_cl import cal_flash_loss, cal_inf_loss

results = []
for code, names in torch.load(sys.argv[1]):
    leaves = [v.requires_grad_() for v in names.values() if v.is_floating_point()]
    scope = {"cal_flash_loss": cal_flash_loss, "cal_inf_loss": cal_inf_loss, **names}
    exec(code, scope)
    results.append((scope["loss"].detach(), list(torch.autograd.grad(scope["loss"], leaves))))
torch.save(results, sys.argv[2])
'''


def inf_cl_cases() -> dict[str, Case]:
    """Rows are multiples of 64: elsewhere Inf-CL's dk kernel (1.2.1) reads upstream gradients past their end."""
    q, k = draw(2, 128, 64, cosine=0.4, dtype=torch.float32)
    close_q, close_k = draw(2, 128, 64, seed=1, cosine=0.7, dtype=torch.float32)
    pair = {"image_features": q, "text_features": k, "logit_scale": torch.tensor(1 / 0.07).log().requires_grad_()}
    both = (
        "options = dict(scale=logit_scale.exp(), head_dim=32)\n"
        "first = cal_flash_loss(image_features, text_features, **options)\n"
        "second = cal_flash_loss(text_features, image_features, **options)\n"
        "loss = (first.mean() + second.mean()) / 2"
    )
    more_keys = torch.cat(draw(3, 64, 64, seed=2, dtype=torch.float32)).detach().requires_grad_()
    labels = torch.randperm(192, generator=torch.Generator().manual_seed(3))[:128]
    ids = torch.arange(128).index_fill(0, torch.tensor([1]), 0)  # the second row is the first once more
    q_twice, k_twice = (vectors.detach()[ids].requires_grad_() for vectors in (q, k))
    plain = "loss = cal_inf_loss(q / 0.07, k, head_dim=64)"
    return {
        "README": Case(migration("Inf-CL")[0], pair),
        "both directions": Case(both, pair),
        "labels": Case(
            "loss = cal_inf_loss(q / 0.07, k, labels, head_dim=64)", {"q": q, "k": more_keys, "labels": labels}
        ),
        "double": Case(plain, {"q": q_twice, "k": k_twice, "ids": ids}),
        "close": Case("loss = cal_inf_loss(q / 0.03, k, head_dim=64)", {"q": close_q, "k": close_k}),
    }


@pytest.fixture(scope="module")
def inf_cl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each case by Inf-CL's own kernels, under Triton's interpreter.

    A process of its own holds what that takes: `TRITON_INTERPRET` must be set before its kernels are declared, `-O`
    drops its assertions that tensors are on CUDA, and the interpreter has no inline assembly, so the only instruction
    written that way is spelled out.
    """
    folder, cases = tmp_path_factory.mktemp("inf_cl"), inf_cl_cases()
    torch.save([(case.code, {n: v.detach() for n, v in case.names.items()}) for case in cases.values()], folder / "in")
    command = [sys.executable, "-O", "-c", INF_CL, str(folder / "in"), str(folder / "out")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "out")
    return {name: Result(case, *result) for (name, case), result in zip(cases.items(), results, strict=True)}


def off_by(grads: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error of a gradient, relative to its norm."""
    return max(float((grad - truth).norm() / truth.norm()) for grad, truth in zip(grads, wanted, strict=True))


def assert_equal_to_inf_cl(loss: Tensor, result: Result) -> None:
    """In float32, and with operands of its gradients' products in TF32, which are off by 2⁻¹¹ at most."""
    torch.testing.assert_close(loss.detach(), result.loss, rtol=1e-5, atol=0)
    assert off_by(torch.autograd.grad(loss, result.case.leaves), result.grads) < 2**-11


@needs_triton
def test_inf_cl(inf_cl: dict[str, Result]) -> None:
    """The learnable scale included."""
    result = inf_cl["README"]
    assert_equal_to_inf_cl(loss_of(migration("Inf-CL")[1], result.case.names), result)


@needs_triton
def test_inf_cl_in_both_directions(inf_cl: dict[str, Result]) -> None:
    """Two calls there, one here."""
    result = inf_cl["both directions"]
    q, k, scale = result.case.leaves
    assert_equal_to_inf_cl(info_nce(q, k, temperature=torch.exp(-scale), symmetric=True), result)


@needs_triton
def test_inf_cl_labels(inf_cl: dict[str, Result]) -> None:
    """Labels that pick from more keys than there are queries: keys that none picks are shared negatives."""
    result = inf_cl["labels"]
    q, keys, labels = result.case.names.values()
    rest = keys[torch.ones(len(keys), dtype=torch.bool).scatter(0, labels, False)]
    assert_equal_to_inf_cl(info_nce(q, keys[labels], negatives=rest, temperature=0.07), result)


@needs_triton
def test_inf_cl_counts_a_double_of_the_positive(inf_cl: dict[str, Result]) -> None:
    result = inf_cl["double"]
    q, k, ids = result.case.names.values()
    assert_equal_to_inf_cl(info_nce(q, k, temperature=0.07), result)
    assert info_nce(q, k, temperature=0.07, positive_ids=ids).item() < result.loss.item() - 1e-3


@needs_triton
def test_inf_cl_s_gradients_drown_once_positives_are_close(inf_cl: dict[str, Result]) -> None:
    """Positives at cosine 0.7: the rounding of Σ p_ij k_j is larger than what is left when k_i is taken from it."""
    result = inf_cl["close"]
    q, k = result.case.leaves
    true_q, true_k = (vectors.detach().double().requires_grad_() for vectors in (q, k))
    logits = true_q @ true_k.T / 0.03
    truth = torch.autograd.grad(functional.cross_entropy(logits, torch.arange(128)), (true_q, true_k))
    assert off_by(result.grads, truth) > 1
    assert off_by(torch.autograd.grad(info_nce(q, k, temperature=0.03), (q, k)), truth) < 1e-5


# Where they differ: repeats in a batch

ONCE, TWICE = 0.3132616875, 0.8619948041
"""log(1 + e⁻¹) and log(2 + e⁻¹): one column at cosine 0 against one's own, or that and one's own a second time."""
BESIDE_BOTH = 0.5514447140
"""log(1 + 2e⁻¹): the row that is no one's double sees two columns at cosine 0 either way."""


def doubles() -> tuple[Tensor, Tensor]:
    """Three rows, the first two of which are the same anchor and the same positive; cosines are 1 or 0."""
    vectors = torch.eye(2, dtype=torch.float64)[[0, 0, 1]]
    return vectors.clone().requires_grad_(), vectors.clone().requires_grad_()


def test_others_count_a_double_of_the_positive(clip_loss: type[nn.Module]) -> None:
    """Their mean is 0.758, and so is ours without ids. Inf-CL's case is above."""
    anchor, positive = doubles()
    wanted = torch.tensor((2 * TWICE + BESIDE_BOTH) / 3, dtype=torch.float64)
    by_hand = functional.cross_entropy(anchor @ positive.T, torch.arange(3))
    torch.testing.assert_close(by_hand, wanted)
    torch.testing.assert_close(ranking_loss(nn.Identity(), (anchor, positive), scale=1.0), wanted)
    torch.testing.assert_close(clip_loss()(anchor, positive, 1.0), wanted)
    torch.testing.assert_close(info_nce(anchor, positive, temperature=1.0), wanted)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("side", ["anchors", "positives"])
def test_ids_leave_a_double_out(side: str, symmetric: bool) -> None:
    """Either side's ids tell: the two rows cost 0.549 less each, the mean falls from 0.758 to 0.393."""
    anchor, positive = doubles()
    ids = torch.tensor([7, 7, 8])
    loss = info_nce(
        anchor,
        positive,
        temperature=1.0,
        anchor_ids=ids if side == "anchors" else None,
        positive_ids=ids if side == "positives" else None,
        symmetric=symmetric,
        reduction="none",
    )
    torch.testing.assert_close(loss, torch.tensor([ONCE, ONCE, BESIDE_BOTH], dtype=torch.float64))
