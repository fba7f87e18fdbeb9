"""What FastAPI cannot see of the endpoint: the formats of its bodies."""

from __future__ import annotations

from typing import Any

from kellm_features.store.http_formats import ARROW, JSON, RAW


def without_unused(schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document without the 422 that FastAPI adds to every operation and that is never given here."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
    return schema


_BINARY = {"schema": {"type": "string", "format": "binary"}}
ID_BODIES: dict[str, Any] = {
    "required": True,
    "content": {
        JSON: {
            "schema": {
                "type": "object",
                "required": ["ids"],
                "additionalProperties": False,
                "properties": {
                    "ids": {
                        "type": "array",
                        "items": {"oneOf": [{"type": "integer", "format": "int64"}, {"type": "string"}]},
                    }
                },
            },
            "example": {"ids": [1, 2]},
        },
        ARROW: _BINARY,
        RAW: _BINARY,
    },
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One row per id, in the request's order.",
        "headers": {
            name: {"description": text, "schema": {"type": kind}}
            for name, text, kind in (
                ("Kellm-Version", "The version that every row is of.", "string"),
                ("Kellm-Dim", "Numbers per row.", "integer"),
                ("Kellm-Count", "Rows.", "integer"),
                ("Kellm-Found", "Rows of ids that the version holds.", "integer"),
            )
        },
        "content": {
            JSON: {
                "example": {
                    "version": "v20261121T183917Z-3f26f88d",
                    "dim": 2,
                    "ids": [1, 2],
                    "found": [True, False],
                    "age_s": [86400.0, None],
                    "embeddings": [[0.6, 0.8], None],
                }
            },
            ARROW: _BINARY,
            RAW: _BINARY,
        },
    },
    **{
        status: {"description": text}
        for status, text in (
            (400, "Malformed ids."),
            (401, "No token, or a wrong one."),
            (404, "No such view."),
            (406, "None of the formats is accepted."),
            (408, "The body took too long."),
            (413, "More ids or bytes than the limits."),
            (415, "The body's format is not read."),
            (503, "The store does not answer, nothing is promoted, or the server is full."),
        )
    },
}
