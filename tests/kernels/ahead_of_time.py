"""Compile what `impl="triton"` launches, for a GPU that is not there: `python ahead_of_time.py TARGET`.

The launches are those of `kellm_kernels.fused` itself, recorded on tensors without data. Prints one JSON object a
compiled kernel: its name and case, bytes of shared memory, matrix instructions, spills to local memory. Wants a process
of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kellm_kernels import fused
from kellm_kernels.plan import Device
from kellm_kernels.problem import AdapterWeights, Contrast, Rows, Vectors

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device(108, 163 << 10)),  # A100
    "sm_89": (GPUTarget("cuda", 89, 32), Device(58, 99 << 10)),  # L4
    "sm_90": (GPUTarget("cuda", 90, 32), Device(132, 227 << 10)),  # H100
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(304, 64 << 10)),  # MI300X
}
CASES = [
    (torch.bfloat16, 64, True),
    (torch.bfloat16, 128, True),
    (torch.bfloat16, 128, False),
    (torch.bfloat16, 512, True),
    (torch.float16, 128, True),
    (torch.float32, 64, True),
    (torch.float32, 512, True),
]
"""Dtype, length of embeddings, every option (ids, log q, …) or none: each set of tiles that `plan` hands out."""

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
}  # fmt: skip
_BATCHES = (1024, 65536)  # a GPU's tiles of few pairs and of many
_NEGATIVES, _ENCODING, _HIDDEN = 1024, 768, 512
_MATRIX = r"\b(?:HGMMA|HMMA)\b|\bv_mfma"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def launches(
    dtype: torch.dtype, dim: int, everything: bool, pairs: int = _BATCHES[-1]
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernel, arguments and options of each launch of a forward and backward, in both kinds of loss."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    fused._launch = lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kept = dtype if everything else torch.float32  # as under autocast, where weights are narrowed as they are read
    shapes = ((_HIDDEN, _ENCODING), (_HIDDEN,), (dim, _HIDDEN), (dim,))
    weights = AdapterWeights(*(empty(*shape, dtype=kept) for shape in shapes), "gelu", True, dtype)
    towers = [empty(count, _ENCODING) for count in (pairs, pairs, _NEGATIVES)][: 3 if everything else 2]
    for symmetric in (False, True) if everything else (False,):
        problem = Contrast(0.03, unit=True)
        if everything:
            ids = [empty(count, dtype=torch.int64) for count in (pairs, pairs, _NEGATIVES)]
            constants = [empty(pairs + _NEGATIVES, dtype=torch.float32), empty(pairs, dtype=torch.float32)]
            problem = Contrast(empty(dtype=torch.float32), *ids, *constants, 0.1, symmetric, 0, "none", True)
        embeddings, norm, hidden, half = fused.adapt(towers, weights, keep=True, halve=True)
        vectors = Vectors(*(*embeddings, None)[:3])
        loss, rows = fused.contrast(vectors, problem, keep=True, hidden=_HIDDEN)
        upstream = (torch.empty_like(loss), *(torch.empty_like(z) if everything else None for z in embeddings[:2]))
        fused.adapt_contrast_backward(
            *upstream, towers, vectors, norm, hidden, half, weights, problem, Rows(*rows),
            want_x=[everything] * len(towers), want_temperature=everything,
        )  # fmt: skip
    return recorded


def source(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """The kernel as Triton's launcher would specialise it; pointers are those of fresh tensors."""
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, (*arguments, *options.values()), strict=False)):
        if name in options:
            signature[name], constants[(place,)] = "constexpr", options[name]
            continue
        plain = name in (kernel.do_not_specialize or ())
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (not plain and isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compiled(name: str) -> Iterator[dict[str, Any]]:
    """Each different kernel of `CASES`, compiled for a target."""
    target, device = TARGETS[name]
    fused.device_of = lambda _device: device
    seen = set()
    for dtype, dim, everything in CASES:
        both = [launch for pairs in _BATCHES for launch in launches(dtype, dim, everything, pairs)]
        for kernel, arguments, options in both:
            compile_options = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
            if target.backend == "hip" and options.get("PRECISION") == "tf32x3":
                options["PRECISION"] = "ieee"  # as `fused` has it where PyTorch is built for ROCm
            key = (kernel, dtype, str(options), str(compile_options))
            if key in seen:
                continue
            seen.add(key)
            binary = triton.compile(source(kernel, arguments, options), target=target, options=compile_options)
            code = binary.asm["amdgcn"] if target.backend == "hip" else _sass(binary.asm["cubin"])
            yield {
                "kernel": kernel.fn.__name__,
                "case": f"{str(dtype).removeprefix('torch.')} E={dim} symmetric={options.get('SECOND')}",
                "products": "PRECISION" in options,
                "shared_bytes": binary.metadata.shared,
                "shared_limit": device.shared_bytes,
                "matrix_instructions": len(re.findall(_MATRIX, code)),
                "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            }


def _sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    with warnings.catch_warnings():
        # Triton 3.9 announces that 3.10 will no longer fuse multiplications and additions by itself.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        for row in compiled(sys.argv[1]):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
