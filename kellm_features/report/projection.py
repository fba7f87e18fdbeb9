"""Two dimensions for the map: PCA, then t-SNE (van der Maaten & Hinton 2008)."""

from __future__ import annotations

import numpy as np

from kellm_features.errors import MissingExtraError

PCA_DIM = 50
"""What van der Maaten & Hinton reduce to before t-SNE."""
PERPLEXITY = 30.0
ITERATIONS = 500
"""Half of scikit-learn's default: 250 with early exaggeration and 250 without were enough for 4,000 items."""


def project(vectors: np.ndarray, seed: int, like: np.ndarray | None = None) -> np.ndarray:
    """Lay vectors out in the plane so that neighbours by cosine stay neighbours.

    Args:
        vectors: (N, D) float, N >= 4.
        seed: of the PCA's and the t-SNE's random states.
        like: (N, 2) an earlier layout of the same items; the result is rotated and mirrored towards it, which leaves
            every distance as it is and makes two maps comparable.

    Returns:
        (N, 2) float64, centred, with the farthest point at distance 1.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", "scikit-learn", "the map of the embeddings") from error
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms == 0, 1, norms)
    reduced = PCA(min(PCA_DIM, *unit.shape), random_state=seed).fit_transform(unit)
    perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
    with threadpool_limits(1):  # its threads spin: on 2 busy cores a second one tripled the CPU time
        tsne = TSNE(2, perplexity=perplexity, max_iter=ITERATIONS, init="pca", random_state=seed)
        layout = _scaled(tsne.fit_transform(reduced).astype(np.float64))
    return layout if like is None else layout @ _rotation(layout, like)


def _scaled(layout: np.ndarray) -> np.ndarray:
    centred = layout - layout.mean(axis=0)
    return np.asarray(centred / max(float(np.linalg.norm(centred, axis=1).max()), 1e-12))


def _rotation(layout: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The orthogonal Procrustes solution: R = UVᵀ of the SVD of layoutᵀ·like."""
    left, _, right = np.linalg.svd(layout.T @ _scaled(like))
    return np.asarray(left @ right)
