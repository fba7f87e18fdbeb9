"""Launch plans keep to the memory that is promised, and fill the device where it allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kellm_kernels.plan import Device, padded, plan_adapter, plan_contrast

H100 = Device(132, 227 << 10)
dims = st.integers(1, 64).map(lambda eighths: 8 * eighths)
lengths = st.integers(1, 300_000)


@given(
    pairs=lengths,
    embedding=dims,
    hidden=st.just(0) | st.integers(2, 128).map(lambda eighths: 8 * eighths),
    encoding=dims,
    itemsize=st.sampled_from([2, 4]),
    symmetric=st.booleans(),
)
def test_extra_memory_stays_within_the_bound(
    pairs: int, embedding: int, hidden: int, encoding: int, itemsize: int, symmetric: bool
) -> None:
    """What `fused` keeps at its two fullest moments, written out anew: 16·B·E + 8·B·H bytes at most."""
    plan = plan_contrast(pairs, pairs, 0, embedding, itemsize=itemsize, symmetric=symmetric, device=H100, hidden=hidden)
    assert plan.row_parts >= 1
    assert plan.column_parts >= 1
    directions = 2 if symmetric else 1
    own_and_loss = 2 * pairs
    by_direction = 3 * directions * pairs  # log_rest, pull, log_factor
    row_parts = plan.row_parts * directions * pairs
    lengths_of_embeddings = 2 * pairs if hidden else 0
    numbers = 4 * (own_and_loss + by_direction + row_parts + lengths_of_embeddings)
    half = 2 * 2 * pairs * embedding if hidden and itemsize == 2 else 0
    means = 0 if symmetric else 4 * plan.row_parts * pairs * embedding
    layer = itemsize * 2 * pairs * hidden
    gradients = itemsize * 2 * pairs * embedding if hidden else 0
    sums = 4 * plan.column_parts * directions * pairs * embedding
    if hidden and itemsize == 4 and plan.column_parts == 1:
        sums = 0  # they lie where the gradients will
    bound = 16 * pairs * embedding + 8 * pairs * hidden
    assert numbers + half + means + layer + gradients + sums <= bound
    if not hidden:
        return
    kept_parts = 0 if symmetric else plan.row_parts
    adapter = plan_adapter(
        2 * pairs, encoding, hidden, embedding, itemsize=itemsize, device=H100, kept_parts=kept_parts
    )
    weights = hidden * encoding + hidden + embedding * hidden + embedding
    parts = 4 * adapter.weight_parts * weights if adapter.weight_parts > 1 else 0
    assert numbers + half + means + layer + gradients + parts <= bound


def test_a_small_batch_is_cut_into_parts_and_a_large_one_is_not() -> None:
    """768 → 512 → 128 in bfloat16 on an H100."""
    small, large = (
        plan_contrast(pairs, pairs, 0, 128, itemsize=2, symmetric=False, device=H100, hidden=512)
        for pairs in (4096, 262_144)
    )
    # 32 blocks of 128 rows would leave half of 132 processors idle, as memory is there for five parts in all.
    assert (small.rows.m, small.row_parts) == (64, 2)
    assert (small.columns.m, small.column_parts) == (64, 3)
    assert (large.rows.m, large.row_parts, large.columns.m, large.column_parts) == (128, 1, 128, 1)


def test_a_small_batch_goes_through_the_adapter_layer_by_layer() -> None:
    small, large = (plan_adapter(rows, 768, 512, 128, itemsize=2, device=H100) for rows in (2 * 1024, 2 * 4096))
    assert (small.layers, small.weight_parts) == (("first", "second"), 1)
    assert large.layers == ("both",)


@given(dim=dims)
def test_padding(dim: int) -> None:
    width = padded(dim)
    assert dim <= width < max(2 * dim, 17)
    assert width & (width - 1) == 0
