"""Numba, with a cache that can be written: workers then load machine code where each would compile for seconds."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if "NUMBA_CACHE_DIR" not in os.environ and not os.access(Path(__file__).parent, os.W_OK):
    # Installed read-only, as on most clusters: Numba would refuse to start. It reads this when first imported.
    os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"kellm-numba-{getpass.getuser()}")

import numba
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    Function = TypeVar("Function", bound=Callable[..., Any])


def njit(*, reorder_sums: bool = False) -> Callable[[Function], Function]:
    """Compile to machine code, kept on disk.

    Args:
        reorder_sums: let sums be added in vector order, which is the same in every run of one machine.
    """
    fastmath = {"reassoc"} if reorder_sums else False
    return cast("Callable[[Function], Function]", numba.njit(cache=True, fastmath=fastmath))


@intrinsic
def _popcount(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


popcount = cast("Callable[[int], int]", _popcount)
"""Bits set in an int64: one instruction, and a vector one where the machine has it."""
