"""Launch plans: tiles by shape, dtype and device, and how many parts a sum is cut into. Plain arithmetic.

A tile is the measured one of `tiles`, or else a starting point: on sm_90 these compile to matrix instructions without
register spills, and they fit the shared memory of sm_80, sm_89, sm_90 and gfx942. Sums are cut into parts where blocks
alone would not fill the device, as far as memory allows: beside inputs and outputs a forward and backward of the whole
keep at most 16·B·E + 8·B·H bytes (H of 16 at least), two negatives counting as one more of the B pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kellm_kernels.tiles import Kernel, Tile, find_tile

_PROGRAMS_PER_PROCESSOR = 2
_MIN_BLOCK = 16  # of a dimension of tl.dot
_BYTES = 4  # of float32, which sums are kept in
_FEW = 16  # float32 numbers a pair at most: similarity, loss, sums, pulls, factors by direction, parts, lengths
_ROOMY = 160 << 10  # bytes of shared memory that a second stage of loads needs at the widest tile


class Device(NamedTuple):
    """What plans look at."""

    processors: int
    """Multiprocessors, compute units."""
    shared_bytes: int
    """Shared memory that one program may take."""
    gpu: str = ""
    """Its kind, as `tiles.Kernel` names it."""


class ContrastPlan(NamedTuple):
    """How the loss is launched."""

    block_e: int
    """Elements of a vector that a program sums."""
    rows: Tile
    """`contrast_rows`: m anchors against n columns at a time."""
    columns: Tile
    """`contrast_columns`: m columns against n anchors at a time."""
    row_parts: int
    column_parts: int


class AdapterPlan(NamedTuple):
    """How the adapter is launched."""

    forward: Tile
    """m rows, n of H, k of D; all of E."""
    backward: Tile
    """`adapter_weights` and `adapter_encodings`: m rows, n of H, k of D."""
    layers: tuple[str, ...]
    """The launches of forward: `both` layers in one, or the `first` and then the `second`."""
    block_e: int
    """Elements of an embedding at a time in backward."""
    weight_parts: int


def blocks_of(count: int, block: int) -> int:
    """How many blocks hold `count`."""
    return -(-count // block)


def padded(dim: int) -> int:
    """The power of two, 16 at least, that holds `dim`."""
    return max(_MIN_BLOCK, 1 << (dim - 1).bit_length())


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Within, kernels of these names have these tiles, whatever the table says: for measuring them."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _tile(
    name: str, itemsize: int, embedding: int, rows: int, device: Device, start: Tile, *, symmetric: bool = False
) -> Tile:
    """The kernel's tile: one that is forced, the measured one, or `start`."""
    kernel = Kernel(device.gpu, name, itemsize, symmetric, padded(embedding))
    return _forced.get(name) or find_tile(kernel, rows) or start


def contrast_tiles(
    rows: int, embedding: int, itemsize: int, device: Device, *, symmetric: bool
) -> tuple[int, Tile, Tile]:
    """Elements at a time, and where `contrast_rows` and `contrast_columns` start from."""
    roomy = device.shared_bytes >= _ROOMY
    if itemsize == 4:
        tile = Tile(64, 32, 0, 8, 2 if roomy else 1)
        return min(padded(embedding), 64), tile, tile
    block_e = min(padded(embedding), 128)
    stages = (3 if block_e <= 64 else 2) if roomy else 1
    # Blocks of 128 would leave processors idle where half of them, at two parts a block, are not as many.
    few = 2 * blocks_of(rows, 128) < device.processors
    m, warps = (64, 4) if few else (128, 8)
    long = embedding > 128
    wide_columns = not long and not (symmetric and block_e == 128)
    return block_e, Tile(m, 32 if long else 64, 0, warps, stages), Tile(m, 64 if wide_columns else 32, 0, warps, stages)


def adapter_tiles(embedding: int, itemsize: int, device: Device) -> tuple[Tile, Tile, int]:
    """Where the forward and the backward kernels start from, and elements of an embedding at a time in backward."""
    long = embedding > 256
    if itemsize == 4:
        return Tile(16 if long else 32, 32, 32, 8, 1), Tile(32, 32, 64, 8, 1), min(padded(embedding), 64)
    stages = 2 if device.shared_bytes >= _ROOMY else 1
    m = 32 if long else 64
    return Tile(m, m, 64, 8, stages), Tile(64, 64, 128, 8, stages), min(padded(embedding), 128)


def plan_contrast(
    rows: int,
    columns: int,
    negatives: int,
    embedding: int,
    *,
    itemsize: int,
    symmetric: bool,
    device: Device,
    hidden: int = 0,
) -> ContrastPlan:
    """The plan for B rows, P positives and N negatives of length E.

    Args:
        rows: B.
        columns: P.
        negatives: N.
        embedding: E.
        itemsize: bytes of an element of the vectors.
        symmetric: both directions.
        device: where it runs.
        hidden: H where the adapter is part of the computation, else 0.
    """
    block_e, row_tile, column_tile = contrast_tiles(rows, embedding, itemsize, device, symmetric=symmetric)
    row_tile = _tile("contrast_rows", itemsize, embedding, rows, device, row_tile, symmetric=symmetric)
    column_tile = _tile("contrast_columns", itemsize, embedding, rows, device, column_tile, symmetric=symmetric)
    wanted = _PROGRAMS_PER_PROCESSOR * device.processors // blocks_of(embedding, block_e)
    most = _most_parts(embedding, hidden, itemsize, symmetric)
    row_blocks = blocks_of(rows, row_tile.m) * (2 if symmetric else 1)
    column_blocks = blocks_of(columns, row_tile.n) + blocks_of(negatives, row_tile.n)
    # A symmetric row keeps no sums of vectors, so its parts cost next to nothing.
    row_parts = max(1, min(wanted // max(row_blocks, 1), column_blocks, 3 if symmetric else most // 2))
    owners = blocks_of(columns, column_tile.m) + blocks_of(negatives, column_tile.m)
    if symmetric:
        owners += blocks_of(rows, column_tile.m)
    left = most if symmetric else most - row_parts
    column_parts = max(1, min(wanted // max(owners, 1), blocks_of(rows, column_tile.n), left))
    return ContrastPlan(block_e, row_tile, column_tile, row_parts, column_parts)


def _most_parts(embedding: int, hidden: int, itemsize: int, symmetric: bool) -> int:
    """How many float32 (B, E) parts of sums fit, rows' and columns' together, or (2B, E) parts if symmetric.

    Kept besides: the hidden layer and the gradients of embeddings in the vectors' dtype where there is an adapter,
    embeddings in float16, and a few numbers a pair. In float32, gradients of embeddings take the place of one part of
    the columns' sums.
    """
    part = _BYTES * (embedding * (2 if symmetric else 1) + 1)  # and the logarithm of its sum
    free = 16 * embedding + 8 * hidden - _BYTES * _FEW
    if hidden:
        free -= 2 * itemsize * (hidden + embedding) + _half(embedding, itemsize)
        if itemsize == _BYTES:
            free += part - _BYTES
    return max(1 if symmetric else 2, free // part)


def _half(embedding: int, itemsize: int) -> int:
    """Bytes of a pair's embeddings kept once more in float16, as those in bfloat16 are."""
    return 0 if itemsize == _BYTES else 2 * 2 * embedding


def plan_adapter(
    rows: int, encoding: int, hidden: int, embedding: int, *, itemsize: int, device: Device, kept_parts: int = 0
) -> AdapterPlan:
    """The plan for R rows of all towers together.

    Args:
        rows: ΣR.
        encoding: D.
        hidden: H.
        embedding: E.
        itemsize: bytes of an element of the products.
        device: where it runs.
        kept_parts: float32 (R/2, E) tensors that the loss keeps meanwhile.
    """
    forward, tile, block_e = adapter_tiles(embedding, itemsize, device)
    forward = _tile("adapter_forward", itemsize, embedding, rows, device, forward)
    tile = _tile("adapter_weights", itemsize, embedding, rows, device, tile)
    if 2 * blocks_of(rows, forward.m) <= device.processors:
        # So few programs would each read all weights while most processors idle. No parts to add up: 8 launches stay 8.
        return AdapterPlan(forward, tile, ("first", "second"), block_e, 1)
    weights = hidden * encoding + hidden + embedding * hidden + embedding
    kept = 2 * itemsize * (hidden + embedding) + _half(embedding, itemsize)
    kept += _BYTES * ((embedding + 1) * kept_parts + _FEW)
    affordable = rows * max(16 * embedding + 8 * hidden - kept, 0) // (2 * _BYTES * weights)
    programs = blocks_of(hidden, tile.n) * (blocks_of(encoding, tile.k) + blocks_of(embedding, block_e))
    wanted = _PROGRAMS_PER_PROCESSOR * device.processors // programs
    return AdapterPlan(forward, tile, ("both",), block_e, max(1, min(wanted, blocks_of(rows, tile.m), affordable)))
