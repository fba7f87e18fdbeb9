"""The contrastive hot path: the adapter MLP and InfoNCE, in memory that grows with B and never with B².

Public functions take and return plain tensors; `impl` says who computes them, and an explicit one never falls back.
This version holds the PyTorch implementation, the reference that later ones are tested against.
"""

from kellm_kernels.adapter import adapter_mlp
from kellm_kernels.contrastive import info_nce

__all__ = ["adapter_mlp", "info_nce"]
