"""Every byte of the stock layout against Feast's own functions, and what is refused when it is read back."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kellm_features.errors import StoreError
from kellm_features.store import wire
from kellm_features.store.backends import Namespace
from kellm_features.store.backends.redis import _fields, _time_field
from kellm_features.store.layout import ITEM_EMBEDDING, VIEWS

WARNINGS = (
    "ignore::DeprecationWarning",  # feast and its dependencies call what newer releases deprecate
    "ignore::FutureWarning",
)
pytestmark = [pytest.mark.feast, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]
quick = settings(max_examples=60, deadline=None)  # a deadline would fail on a busy machine

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # a lone surrogate has no UTF-8
SMALLEST, LARGEST = -(2**63), 2**63 - 1


def feast_key(join_key: str, value: int | str):
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    told = Value(string_val=value) if isinstance(value, str) else Value(int64_val=value)
    return EntityKey(join_keys=[join_key], entity_values=[told])


def feast_values(kind: str, rows: list) -> list[bytes]:
    """The rows as Feast's own materialization makes them of an Arrow column."""
    from feast.type_map import python_values_to_proto_values
    from feast.value_type import ValueType

    types = {
        "string": ValueType.STRING,
        "int64": ValueType.INT64,
        "float64": ValueType.DOUBLE,
        "embedding": ValueType.FLOAT_LIST,
        "scores": ValueType.DOUBLE_LIST,
        "ids": ValueType.INT64_LIST,
        "text ids": ValueType.STRING_LIST,
    }
    return [value.SerializeToString() for value in python_values_to_proto_values(rows, types[kind])]


@quick
@given(st.lists(INT64, max_size=8))
@example([SMALLEST, -1, 0, 1, LARGEST])
def test_integer_keys(ids: list[int]) -> None:
    from feast.infra.key_encoding_utils import serialize_entity_key

    keys = wire.EntityKeys("item_id", "int64")
    encoded = keys.encode(ids)
    assert encoded == [serialize_entity_key(feast_key("item_id", key), 3) for key in ids]
    assert [keys.decode(key) for key in encoded] == ids


@quick
@given(st.lists(TEXT, max_size=8))
@example(["", "tt0001", "naïve 🎬", "*?[a]\\", "a\0b"])
def test_text_keys(ids: list[str]) -> None:
    from feast.infra.key_encoding_utils import deserialize_entity_key, serialize_entity_key

    keys = wire.EntityKeys("user_id", "string")
    encoded = keys.encode(ids)
    assert encoded == [serialize_entity_key(feast_key("user_id", key), 3) for key in ids]
    assert [keys.decode(key) for key in encoded] == ids
    assert [deserialize_entity_key(key, 3).entity_values[0].string_val for key in encoded] == ids


@pytest.mark.parametrize("key", [7, SMALLEST, "tt0001", ""])
def test_redis_keys(key: int | str) -> None:
    from feast.infra.online_stores.helpers import _redis_key, _redis_key_prefix

    keys = wire.EntityKeys("item_id", "string" if isinstance(key, str) else "int64", b"films")
    (encoded,) = keys.encode([key])
    assert encoded == _redis_key("films", feast_key("item_id", key), 3)
    assert keys.prefix == _redis_key_prefix(["item_id"])
    assert keys.decode(encoded) == key


@pytest.mark.parametrize("spec", VIEWS, ids=lambda spec: spec.name)
def test_redis_fields(spec) -> None:
    """Names of a hash's fields, as Feast's Redis store has them for a view of the namespace's name."""
    from feast.infra.online_stores.helpers import _mmh3

    namespace = Namespace("films", spec, 12, "int64")
    assert _fields(namespace) == {name: _mmh3(f"{spec.name}_v12:{name}") for name, _ in spec.features}
    assert _time_field(namespace) == f"_ts:{spec.name}_v12".encode()


@quick
@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999_999)))
@example(datetime(1970, 1, 1))
@example(datetime(1969, 12, 31, 23, 59, 59, 999_999))
@example(datetime(2026, 3, 1, 12, 0, 0, 250_000))
def test_timestamps(moment: datetime) -> None:
    from google.protobuf.timestamp_pb2 import Timestamp

    told = Timestamp()
    told.FromDatetime(moment)
    micros = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    encoded = wire.encode_timestamp(micros)
    assert encoded == told.SerializeToString()
    assert wire.decode_timestamp(encoded) == pytest.approx(moment.replace(tzinfo=UTC).timestamp(), abs=1e-4)


@quick
@given(st.lists(INT64, min_size=1, max_size=20))
@example([0, 1, 127, 128, 16_383, 16_384, -1, SMALLEST, LARGEST])
@example([2**shift for shift in range(63)] + [2**shift - 1 for shift in range(63)])
def test_integers(values: list[int]) -> None:
    assert wire.encode_column(pa.array(values, pa.int64()), "int64") == feast_values("int64", values)


@quick
@given(st.lists(TEXT, min_size=1, max_size=8))
@example(["", "naïve 🎬", "x" * 200, "y" * 20_000])
def test_strings(values: list[str]) -> None:
    """An empty text is a value, and not null, here as in Feast."""
    encoded = wire.encode_column(pa.array(values), "string")
    assert encoded == feast_values("string", values)
    assert all(encoded)


@quick
@given(st.lists(st.floats(), min_size=1, max_size=8))
@example([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 5e-324])
def test_doubles(values: list[float]) -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    # Not through python_values_to_proto_values: it takes NaN for null, and a score may be NaN without being missing.
    stock = [Value(double_val=value).SerializeToString() for value in values]
    assert wire.encode_column(pa.array(values, pa.float64()), "float64") == stock


@quick
@given(st.lists(st.lists(FLOAT32, max_size=40), min_size=1, max_size=6))
@example([[], [1.0], [0.0] * 31, [0.0] * 32, [1.0] * 5000])
def test_vectors_of_any_length(rows: list[list[float]]) -> None:
    from feast.protos.feast.types.Value_pb2 import FloatList, Value

    stock = [Value(float_list_val=FloatList(val=row)).SerializeToString() for row in rows]
    assert wire.encode_column(pa.array(rows, pa.list_(pa.float32())), "embedding") == stock


@quick
@given(st.lists(st.lists(st.floats(allow_nan=False), max_size=40), min_size=1, max_size=6))
def test_scores(rows: list[list[float]]) -> None:
    from feast.protos.feast.types.Value_pb2 import DoubleList, Value

    stock = [Value(double_list_val=DoubleList(val=row)).SerializeToString() for row in rows]
    assert wire.encode_column(pa.array(rows, pa.list_(pa.float64())), "scores") == stock


@quick
@given(st.lists(st.lists(INT64, max_size=30), min_size=1, max_size=6))
@example([[], [0], [SMALLEST, -1, LARGEST], [7] * 200, []])
def test_lists_of_integer_ids(rows: list[list[int]]) -> None:
    from feast.protos.feast.types.Value_pb2 import Int64List, Value

    stock = [Value(int64_list_val=Int64List(val=row)).SerializeToString() for row in rows]
    assert wire.encode_column(pa.array(rows, pa.list_(pa.int64())), "ids") == stock


@quick
@given(st.lists(st.lists(TEXT, max_size=8), min_size=1, max_size=6))
@example([[], [""], ["", "a", ""], ["naïve 🎬", "x" * 200], []])
def test_lists_of_text_ids(rows: list[list[str]]) -> None:
    from feast.protos.feast.types.Value_pb2 import StringList, Value

    stock = [Value(string_list_val=StringList(val=row)).SerializeToString() for row in rows]
    assert wire.encode_column(pa.array(rows, pa.list_(pa.string())), "ids") == stock


COLUMNS = [
    ("string", pa.string(), ["a", None, "", None]),
    ("int64", pa.int64(), [None, 0, -1, None]),
    ("float64", pa.float64(), [1.5, None, None, 0.0]),
    ("embedding", pa.list_(pa.float32()), [[1.0, 2.0], None, [3.0, 4.0], None]),
    ("scores", pa.list_(pa.float64()), [None, [0.5], [], None]),
    ("ids", pa.list_(pa.int64()), [[1, 2], None, [], [3]]),
    ("ids", pa.list_(pa.string()), [None, ["a"], [], ["b", ""]]),
]


@pytest.mark.parametrize(("kind", "dtype", "rows"), COLUMNS, ids=lambda value: str(value)[:24])
def test_null_is_an_empty_message_and_an_empty_list_is_not(kind, dtype, rows) -> None:
    """As Feast writes them, whatever way Arrow holds the column: whole, sliced, in pieces, with nulls' slots filled."""
    stock = feast_values("text ids" if dtype == pa.list_(pa.string()) else kind, rows)
    assert [value == b"" for value in stock] == [row is None for row in rows]
    whole = pa.array(rows, dtype)
    assert wire.encode_column(whole, kind) == stock
    assert wire.encode_column(pa.array([rows[0], *rows, rows[1]], dtype).slice(1, len(rows)), kind) == stock
    assert wire.encode_column(pa.chunked_array([whole.slice(0, 1), whole.slice(1)]), kind) == stock
    assert wire.encode_column(pa.chunked_array([], dtype), kind) == []
    assert wire.encode_column(pa.array([None, None], dtype), kind) == [b"", b""]


def test_a_null_list_whose_slot_holds_elements() -> None:
    """Arrow allows it: the mask hides them, and they are no part of the next row."""
    rows = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5], pa.int32()), pa.array([1, 2, 8, 9, 3], pa.float32()), mask=pa.array([False, True, False])
    )
    assert rows.to_pylist() == [[1.0, 2.0], None, [3.0]]
    assert wire.encode_column(rows, "embedding") == feast_values("embedding", [[1.0, 2.0], None, [3.0]])


@pytest.mark.parametrize("dim", [1, 31, 32, 384, 4096])
def test_vectors_come_back(dim: int) -> None:
    """NaN rows where nothing is stored, and every bit of the others, of float NaN as well."""
    rng = np.random.default_rng(dim)
    vectors = rng.standard_normal((5, dim)).astype(np.float32)
    vectors[3, 0] = np.float32("nan")
    stored = wire.encode_column(pa.array(list(vectors), pa.list_(pa.float32())), "embedding")
    assert stored[0].startswith(wire.vector_header(dim))
    values, found = wire.decode_vectors([stored[0], None, stored[3], b"", stored[4]], dim)
    assert values.dtype == np.float32
    assert found.tolist() == [True, False, True, False, True]
    assert values[found].tobytes() == vectors[[0, 3, 4]].tobytes()
    assert np.isnan(values[~found]).all()
    values, found = wire.decode_vectors(stored, dim)
    assert values.tobytes() == vectors.tobytes()
    assert found.all()


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_found_has_the_vectors_shape(count: int) -> None:
    values, found = wire.decode_vectors([None] * count, 8)
    assert values.shape == (count, 8)
    assert found.tolist() == [False] * count


def foreign() -> dict[str, bytes]:
    from feast.protos.feast.types.Value_pb2 import DoubleList, FloatList, Int64List, Value

    apart = b"\x0d" + struct.pack("<f", 1.0)  # an element by itself, as proto2 wrote them
    return {
        "shorter": Value(float_list_val=FloatList(val=[1.0] * 7)).SerializeToString(),
        "longer": Value(float_list_val=FloatList(val=[1.0] * 9)).SerializeToString(),
        "a text of the same length": Value(string_val="x" * 34).SerializeToString(),
        "doubles": Value(double_list_val=DoubleList(val=[1.0] * 4)).SerializeToString(),
        "integers": Value(int64_list_val=Int64List(val=[1] * 32)).SerializeToString(),
        "not packed": b"\x82\x01\x28" + apart * 8,
        "no message": b"\xff" * 37,
        "one byte": b"\x00",
    }


def test_what_is_no_vector_is_refused() -> None:
    """Also one between good rows."""
    (good,) = wire.encode_column(pa.array([[1.0] * 8], pa.list_(pa.float32())), "embedding")
    wire.decode_vectors([good, None, good], 8)
    for wrong in foreign().values():
        for values in ([wrong], [good, None, wrong, good]):
            with pytest.raises(StoreError, match=r"no vector of length 8 .* publish the embeddings anew"):
                wire.decode_vectors(values, 8)


def test_two_wrong_lengths_that_add_up_are_refused() -> None:
    shorter, longer = foreign()["shorter"], foreign()["longer"]
    with pytest.raises(StoreError, match="a row holds 33 bytes"):
        wire.decode_vectors([shorter, longer], 8)


def test_the_view_of_embeddings_begins_with_its_vector() -> None:
    """What the reader asks for is the first feature."""
    assert ITEM_EMBEDDING.features[0] == ("embedding", "embedding")
