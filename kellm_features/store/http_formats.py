"""The bodies that the HTTP endpoint reads and writes: JSON, Arrow IPC streams and raw little-endian numbers.

A body is untrusted. Every number that it declares is checked before it sizes an allocation: Arrow's buffers are
validated in full before they are read, and its compressed and dictionary-encoded forms, of which a few bytes can
stand for gigabytes, are refused.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from kellm_features.errors import KellmError

if TYPE_CHECKING:
    from kellm_features.store.layout import IdType
    from kellm_features.store.reader import Embeddings

ARROW = "application/vnd.apache.arrow.stream"
RAW = "application/octet-stream"
JSON = "application/json"
FORMATS = (JSON, ARROW, RAW)
"""Best first where the caller accepts several alike."""
VERSION_KEY = b"kellm.version"
"""Where the Arrow schema's metadata names the version."""

Ids = NDArray[np.int64] | list[str]

_DECIMAL = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, struct.error)


@dataclass(frozen=True)
class Limits:
    """What one request may ask of the server."""

    max_ids: int = 10_000
    max_json_ids: int = 1_000
    """Rows of a JSON answer: 10,000 rows of 384 numbers take the event loop half a second to spell out."""
    max_body_bytes: int = 4 * 1024 * 1024
    max_id_length: int = 256
    """Characters of a string id."""
    max_in_flight: int = 256
    """Requests for embeddings that one worker holds at once; more are told to come back (503)."""
    body_timeout_s: float = 10.0
    """From the first to the last byte of a body."""
    store_timeout_s: float = 5.0


class RequestError(KellmError):
    """A request that is refused, with the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@lru_cache(maxsize=64)
def answer_format(accept: str | None) -> str:
    """The format of `FORMATS` that an Accept header likes best; JSON where it is absent or likes all alike.

    Raises:
        RequestError: 406, it accepts none of them.
    """
    liking = dict.fromkeys(FORMATS, 0.0)
    precision = dict.fromkeys(FORMATS, -1)
    for part in (accept or "*/*").split(","):
        media, *parameters = (word.strip().lower() for word in part.split(";"))
        for name in FORMATS:
            if media in (name, "application/*", "*/*") and len(media.replace("*", "")) > precision[name]:
                precision[name] = len(media.replace("*", ""))  # the most exact range decides, RFC 9110 12.5.1
                liking[name] = _quality(parameters)
    best = max(FORMATS, key=lambda name: liking[name])  # the first of equals
    if not liking[best]:
        raise RequestError(406, f"the Accept header admits none of the formats here: {', '.join(FORMATS)}")
    return best


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(max(0.0, float(parameter[2:])), 1.0)  # in this order, NaN is 0
            except ValueError:
                return 0.0
    return 1.0


def read_ids(media: str, body: bytes, id_type: IdType, limits: Limits) -> Ids:
    """The ids that the body of a request asks for, in its order, repeated ones kept.

    Args:
        media: the Content-Type without parameters.
        body: at most `limits.max_body_bytes`.
        id_type: of the view.
        limits: of the server.

    Returns:
        (N,) int64, or a list of N strings.

    Raises:
        RequestError: 400 malformed or of the wrong type, 413 more or longer ids than the limits, 415 another format.
    """
    if media == JSON:
        return _as_ids(_from_json(body, id_type), id_type, limits)
    if media == ARROW:
        return _as_ids(_from_arrow(body, id_type, limits), id_type, limits)
    if media == RAW:
        if id_type != "int64":
            raise RequestError(415, f"this view's ids are strings: send them as {JSON} or {ARROW}")
        if len(body) % 8:
            raise RequestError(400, f"the body has {len(body)} bytes: raw ids are little-endian int64, 8 bytes each")
        _count(len(body) // 8, limits)
        return np.frombuffer(body, "<i8").astype(np.int64, copy=False)
    raise RequestError(415, f"this Content-Type is not read here: send ids as {', '.join(FORMATS)}")


def ids_of_query(values: list[str], id_type: IdType, limits: Limits) -> Ids:
    """The ids of `?id=1&id=2`.

    Raises:
        RequestError: 400 none given or not decimal where the view's are integers, 413 over the limits.
    """
    if not values:
        raise RequestError(400, "no id is given: ask with ?id=1&id=2, or POST the ids")
    if id_type == "string":
        return _as_ids(values, id_type, limits)
    for place, value in enumerate(values):
        if not _DECIMAL.fullmatch(value):
            raise RequestError(400, f"id number {place + 1} is not a decimal integer: this view's ids are int64")
    return _as_ids([int(value) for value in values], id_type, limits)


def _as_ids(values: list[Any], id_type: IdType, limits: Limits) -> Ids:
    """Values of the right type as ids, within int64 and the limits."""
    _count(len(values), limits)
    if id_type == "int64":
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError as error:
            raise RequestError(400, "an id is not within int64") from error
    for place, value in enumerate(values):
        if len(value) > limits.max_id_length:
            raise RequestError(
                413, f"id number {place + 1} has {len(value)} characters; at most {limits.max_id_length} are taken"
            )
    return values


def _count(count: int, limits: Limits) -> None:
    if count > limits.max_ids:
        raise RequestError(413, f"{count} ids are asked for; at most {limits.max_ids} are answered: send them in parts")


def _from_json(body: bytes, id_type: IdType) -> list[Any]:
    try:
        told = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(told, dict) or told.keys() != {"ids"} or not isinstance(told["ids"], list):
        raise RequestError(400, 'the body is not of the form {"ids": [1, 2]}')
    ids: list[Any] = told["ids"]
    kind, name = (int, "an integer: this view's ids are int64") if id_type == "int64" else (str, "a string")
    for place, value in enumerate(ids):
        if type(value) is not kind:  # true and false are integers to isinstance
            raise RequestError(400, f"id number {place + 1} is not {name}")
    return ids


def _from_arrow(body: bytes, id_type: IdType, limits: Limits) -> list[Any]:
    """Reads message by message, so that nothing is unpacked before it is known to be plain."""
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
        first = messages.read_next_message()
        if first.type != "schema":  # read_schema takes any message for one, and follows its bytes wherever they point
            raise RequestError(400, f"the Arrow stream begins with a message of type {first.type}: begin with a schema")
        schema = pa.ipc.read_schema(first)
        _check_schema(schema, id_type)
        ids: list[Any] = []
        for message in _rest(messages):
            if message.type != "record batch":
                raise RequestError(400, f"the Arrow stream holds a {message.type}: send a schema and record batches")
            if _compressed(message.metadata):
                raise RequestError(400, "the Arrow stream is compressed: send it uncompressed")
            batch = pa.ipc.read_record_batch(message, schema)
            _count(len(ids) + batch.num_rows, limits)
            batch.validate(full=True)  # offsets and lengths are the caller's: unchecked, they read outside the body
            column = batch.column(0)
            if column.null_count:
                raise RequestError(400, "the Arrow column id holds nulls: leave them out")
            ids += column.cast(pa.int64() if id_type == "int64" else pa.string()).to_pylist()
    except StopIteration as error:
        raise RequestError(400, "the body is not an Arrow IPC stream: it holds no schema") from error
    except _ARROW_ERRORS as error:
        told = str(error).partition("\n")[0][:200]
        raise RequestError(400, f"the body is not a readable Arrow IPC stream: {told}") from error
    return ids


def _rest(messages: Any) -> Any:
    while True:
        try:
            yield messages.read_next_message()
        except StopIteration:
            return


def _check_schema(schema: pa.Schema, id_type: IdType) -> None:
    if schema.names != ["id"]:
        raise RequestError(400, f"the Arrow stream has {len(schema.names)} columns: send one, named id")
    kind = schema.field(0).type
    if id_type == "int64" and not pa.types.is_integer(kind):
        raise RequestError(400, f"the Arrow column id is {_short(kind)}: this view's ids are int64")
    if id_type == "string" and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise RequestError(400, f"the Arrow column id is {_short(kind)}: this view's ids are string or large_string")


def _short(kind: pa.DataType) -> str:
    return str(kind)[:60]


def _compressed(metadata: pa.Buffer) -> bool:
    """Whether a record batch message says that its body is compressed.

    pyarrow does not tell, and unpacks what the message declares before anyone may look: 1 kB can declare 100 GB. The
    metadata is a FlatBuffer: table Message (field 2: the RecordBatch), table RecordBatch (field 3: compression), each
    opened by the distance back to its vtable, which lists where its fields lie (0: absent).
    """
    data = memoryview(metadata)

    def field(table: int, index: int) -> int:
        vtable = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * index >= struct.unpack_from("<H", data, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0]
        return table + offset if offset else 0

    message = struct.unpack_from("<I", data, 0)[0]
    header = field(message, 2)
    return bool(field(header + struct.unpack_from("<I", data, header)[0], 3))


def write_embeddings(media: str, ids: Ids, answer: Embeddings) -> bytes | memoryview:
    """The body of an answer, one row per id in the request's order; the formats are told in docs/serving-http.md."""
    if media == RAW:
        return np.ascontiguousarray(answer.values, "<f4").tobytes()
    if media == ARROW:
        return memoryview(_to_arrow(ids, answer))
    rows = zip(answer.values.tolist(), answer.found.tolist(), strict=True)
    return to_json(
        {
            "version": answer.version,
            "dim": answer.values.shape[1],
            "ids": ids if isinstance(ids, list) else ids.tolist(),
            "found": answer.found.tolist(),
            "age_s": answer.age_s.tolist(),
            "embeddings": [row if found else None for row, found in rows],
        },
        inf_nan_mode="null",
    )


def _to_arrow(ids: Ids, answer: Embeddings) -> pa.Buffer:
    dim = answer.values.shape[1]
    vectors = pa.array(np.ascontiguousarray(answer.values).reshape(-1), pa.float32())
    columns = {
        "id": pa.array(ids, pa.string() if isinstance(ids, list) else pa.int64()),
        "found": pa.array(answer.found),
        "age_s": pa.array(answer.age_s, mask=np.isnan(answer.age_s)),
        "embedding": pa.FixedSizeListArray.from_arrays(vectors, dim, mask=pa.array(~answer.found)),
    }
    fields = [pa.field(name, column.type, name not in ("id", "found")) for name, column in columns.items()]
    schema = pa.schema(fields, metadata={VERSION_KEY: answer.version.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return sink.getvalue()
