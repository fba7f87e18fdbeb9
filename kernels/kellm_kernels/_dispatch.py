"""Which implementation runs: one rule for every public function."""

from __future__ import annotations

IMPLS = ("auto", "torch", "triton")


def resolve_impl(impl: str) -> str:
    """The implementation to run: `auto` is `torch` in this version.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: `triton`, which this version does not hold.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; accepted: {', '.join(map(repr, IMPLS))}")
    if impl == "triton":
        raise NotImplementedError("impl='triton' is not built in this version: pass impl='torch' or impl='auto'")
    return "torch"
