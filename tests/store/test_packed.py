"""The packed layout: what a value is made of, that it comes back rounded as NumPy rounds, and what is refused."""

from __future__ import annotations

import re
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kellm_features.errors import StoreError
from kellm_features.store import packed

WARNINGS = (
    "ignore::DeprecationWarning",  # feast and its dependencies call what newer releases deprecate
    "ignore::FutureWarning",
)
pytestmark = [pytest.mark.feast, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]
quick = settings(max_examples=60, deadline=None)  # a deadline would fail on a busy machine

T = 1_772_366_400_250_000
INSIDE = st.floats(-65504, 65504, width=32)  # what a float16 reaches
MATRICES = st.tuples(st.integers(0, 6), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=INSIDE)
)


def lists(vectors: np.ndarray) -> pa.Array:
    return pa.array(list(vectors), pa.list_(pa.float32()))


def cosines(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return exact @ exact.T


def test_a_value_byte_by_byte() -> None:
    """Time, vector, then each further feature with its length; 1.0 is 0x3c00 and -2.0 is 0xc000 in a float16."""
    (value,) = packed.encode_rows(lists(np.array([[1.0, -2.0]], dtype=np.float32)), T, [[b"ab"], [b""]])
    assert value == struct.pack("<q", T) + bytes.fromhex("003c00c0") + b"\x02\0\0\0ab" + b"\0\0\0\0"


def test_keys() -> None:
    assert packed.key_prefix("films", "item_knowledge_embedding_v3") == b"kellm:films:item_knowledge_embedding_v3:"
    ids = [0, -1, 2**63 - 1, -(2**63), "tt0001", "naïve", ""]
    texts = [b"0", b"-1", b"9223372036854775807", b"-9223372036854775808", b"tt0001", "naïve".encode(), b""]
    assert packed.encode_ids(ids) == texts


@quick
@given(MATRICES)
@example(np.array([[65504.0, -65504.0, 2.0**-24, 2.0**-26, 1 + 2.0**-11, -0.0]], dtype=np.float32))
def test_vectors_come_back_as_numpy_rounds_them(vectors: np.ndarray) -> None:
    values = packed.encode_rows(lists(vectors), T, [])
    dim = vectors.shape[1]
    assert all(len(value) == 8 + 2 * dim for value in values)
    decoded, found = packed.decode_rows(values, dim)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == vectors.astype(np.float16).astype(np.float32).tobytes()
    assert found.tolist() == [True] * len(vectors)
    assert packed.event_times(values) == [T / 1e6] * len(vectors)


def test_the_loss_that_the_docs_state() -> None:
    """A component of a unit vector loses at most 2^-11 of itself; a cosine of two 384-d vectors about 1e-5."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 384))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    decoded, _ = packed.decode_rows(packed.encode_rows(lists(vectors), T, []), 384)
    normal = np.abs(vectors) >= 2.0**-14  # below, a float16 has fewer bits
    assert (np.abs(decoded - vectors)[normal] <= 2.0**-11 * np.abs(vectors[normal])).all()
    exact, rounded = (
        m / np.linalg.norm(m, axis=1, keepdims=True) for m in (vectors.astype(float), decoded.astype(float))
    )
    lost = np.abs(exact @ exact.T - rounded @ rounded.T)
    assert 5e-6 < lost.mean() < 2e-5
    assert lost.max() < 1e-4


@quick
@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=5)), min_size=1, max_size=5), st.integers(1, 20))
def test_tails_come_back(rows: list[tuple[bytes, bytes]], dim: int) -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    vectors = np.arange(len(rows) * dim, dtype=np.float32).reshape(len(rows), dim)
    values = packed.encode_rows(lists(vectors), -5, [[a for a, _ in rows], [b for _, b in rows]])
    for value, vector, tail in zip(values, vectors, rows, strict=True):
        told, features = packed.as_feast_values(value, dim)
        assert list(Value.FromString(told).float_list_val.val) == vector.tolist()
        assert features == list(tail)
    assert packed.event_times(values) == [-5e-6] * len(rows)
    decoded, _ = packed.decode_rows(values, dim)  # whatever lies behind the vectors
    assert decoded.tolist() == vectors.tolist()


def test_missing_rows() -> None:
    vectors = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    first, second = packed.encode_rows(lists(vectors), T, [])
    values, found = packed.decode_rows([None, first, b"", second], 2)
    assert found.tolist() == [False, True, False, True]
    assert values[found].tolist() == vectors.tolist()
    assert np.isnan(values[~found]).all()
    assert packed.event_times([None, first, b""]) == [None, T / 1e6, None]
    assert packed.decode_rows([None], 2)[0].shape == (1, 2)
    assert packed.decode_rows([], 2)[0].shape == (0, 2)


@pytest.mark.parametrize("component", [65520.0, -1e5, 3e38, float("inf"), float("nan")])
def test_what_no_float16_holds_is_refused(component: float) -> None:
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1, 2] = component
    with pytest.raises(
        StoreError, match=re.escape(f"an embedding holds {abs(component):g}, and float16 ends at 65504")
    ):
        packed.encode_rows(lists(vectors), T, [])


@pytest.mark.parametrize("missing", [1, 8, 13])
def test_a_value_too_short_is_refused(missing: int) -> None:
    good, cut = packed.encode_rows(lists(np.ones((2, 4), dtype=np.float32)), T, [])
    with pytest.raises(StoreError, match=f"a row holds {16 - missing} bytes"):
        packed.decode_rows([good, cut[:-missing]], 4)


def test_a_slice_of_a_longer_column() -> None:
    """Publishing reads a partition in pieces; a piece begins in the middle of Arrow's buffer."""
    vectors = np.arange(20, dtype=np.float32).reshape(5, 4)
    column = lists(vectors)
    decoded, _ = packed.decode_rows(packed.encode_rows(column.slice(2, 2), T, []), 4)
    assert decoded.tolist() == vectors[2:4].tolist()
    pieces = pa.chunked_array([column.slice(0, 1), column.slice(1)])
    assert packed.decode_rows(packed.encode_rows(pieces, T, []), 4)[0].tolist() == vectors.tolist()
