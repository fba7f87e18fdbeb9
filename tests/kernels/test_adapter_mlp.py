"""The adapter MLP against its formula in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kellm_kernels import adapter_mlp


def formula(x: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray, act: str) -> np.ndarray:
    hidden = x @ w1.T + b1
    if act == "gelu":
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    else:
        hidden = np.maximum(hidden, 0)
    return hidden @ w2.T + b2


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_formula(activation: str, normalize: bool) -> None:
    rng = np.random.default_rng(0)
    x, w1, b1, w2, b2 = (rng.normal(size=s) for s in ((5, 7), (11, 7), (11,), (3, 11), (3,)))
    wanted = formula(x, w1, b1, w2, b2, activation)
    if normalize:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    got = adapter_mlp(*(torch.from_numpy(v) for v in (x, w1, b1, w2, b2)), activation=activation, normalize=normalize)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)


def test_a_zero_vector_stays_zero() -> None:
    z = adapter_mlp(torch.ones(1, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4))
    assert z.tolist() == [[0.0] * 4]


def test_bad_shapes_and_names_are_refused() -> None:
    good = (torch.ones(1, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="do not fit"):
        adapter_mlp(good[0], good[1].T, *good[2:])
    with pytest.raises(ValueError, match="'tanh' is unknown"):
        adapter_mlp(*good, activation="tanh")
    with pytest.raises(ValueError, match="impl='triton' is unknown; accepted: 'auto', 'torch'"):
        adapter_mlp(*good, impl="triton")
