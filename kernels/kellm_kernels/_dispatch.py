"""Which implementations there are: one rule for every public function."""

from __future__ import annotations

IMPLS = ("auto", "torch")
"""`auto` takes the best one for the input; today that is `torch`."""


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one that this version holds."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; accepted: {', '.join(map(repr, IMPLS))}")
