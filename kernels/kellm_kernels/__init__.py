"""The contrastive hot path: the adapter MLP and InfoNCE, in memory that grows with B and never with B².

Public functions take and return plain tensors; `impl` says who computes them, and an explicit one never falls back.
"""

from kellm_kernels.adapter import adapter_mlp
from kellm_kernels.contrastive import info_nce, info_nce_shard
from kellm_kernels.joint import adapter_info_nce
from kellm_kernels.tiles import use_tiles

__all__ = ["adapter_info_nce", "adapter_mlp", "info_nce", "info_nce_shard", "use_tiles"]
