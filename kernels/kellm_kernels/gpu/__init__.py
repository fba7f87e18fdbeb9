"""The Triton kernels themselves; `kellm_kernels.fused` launches them. Importing them needs Triton."""
