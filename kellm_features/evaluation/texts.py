"""What is encoded of an item: the text variants that arms are compared by, and their frozen vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kellm_features.errors import DataError
from kellm_features.knowledge.encode import encoded_text
from kellm_features.knowledge.encoder import Encoder
from kellm_features.knowledge.engines.template import TemplateEngine
from kellm_features.knowledge.inputs import InputPath, Inputs
from kellm_features.knowledge.requests import Request
from kellm_features.knowledge.vectors import VectorStore
from kellm_features.progress import track
from kellm_features.settings import EncodeSettings, Settings

Vectors = npt.NDArray[np.float32]

TITLE, DIGEST, PAGE, CLOSED_BOOK = "title", "digest", "page", "closed-book"
VARIANTS = {
    TITLE: "title and genres",
    DIGEST: "factor digest of the linked page",
    PAGE: "linked Wikipedia page",
    CLOSED_BOOK: "closed-book LLM text",
}
"""Variant -> what people read. A `+` between variants stands for their vectors side by side."""

_PROFILE_TOKENS = 192
_SLICE = 512


def read_descriptions(path: Path, item_ids: Sequence[Any]) -> dict[Any, str]:
    """Item id -> text: a JSON object, or a Parquet table with `item_id` and `description`.

    Empty texts are left out.

    Raises:
        DataError: missing, unreadable, or about none of the items.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: give --descriptions a JSON object of texts by item id, or Parquet")
    texts: dict[str, str]
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f"{path}: a JSON object of texts by item id is accepted, a {type(found).__name__} is seen")
        texts = {item_id: text or "" for item_id, text in found.items()}
        wrong = [item_id for item_id, text in texts.items() if not isinstance(text, str)]
        if wrong:
            raise DataError(
                f"{path}: the text of item {wrong[0]!r} is of type {type(texts[wrong[0]]).__name__}, not text"
            )
    else:
        from kellm_features.data.tables import read_frame

        frame = read_frame(path)
        if not {"item_id", "description"} <= set(frame.columns):
            raise DataError(f"{path}: columns item_id and description are needed; seen: {', '.join(frame.columns)}")
        texts = dict(zip(frame["item_id"].astype(str), frame["description"].fillna("").astype(str), strict=True))
    by_item = {item_id: texts[str(item_id)] for item_id in item_ids if texts.get(str(item_id), "").strip()}
    if not by_item:
        raise DataError(f"{path} describes none of the {len(item_ids)} items: its {len(texts)} ids are other ones")
    return by_item


def item_texts(inputs: Inputs, closed_book: Mapping[Any, str] | None) -> dict[str, list[str]]:
    """Variant -> the text of each item, in the order of the catalogue.

    Every text stands behind title, year and genres, as in stage `encode`; an item without a page, or without a
    closed-book text, has these alone.

    Args:
        inputs: catalogue and linked pages.
        closed_book: texts of a model that was shown the title alone; None leaves the variant out.
    """
    rows = inputs.items.to_pylist()
    ids = [row["item_id"] for row in rows]

    def headed(row: Mapping[str, Any], text: str) -> str:
        return encoded_text(row["title"], row["year"], row["genres"], text)

    digests = describe(inputs.item_requests(ids), max_tokens=inputs.settings.generate.max_tokens)
    found = {
        TITLE: [headed(row, "").strip() for row in rows],
        DIGEST: [headed(row, digest) for row, digest in zip(rows, digests, strict=True)],
        PAGE: [
            headed(row, " ".join(page.lead for page in inputs.pages.get(row["item_id"], ()))).strip() for row in rows
        ],
    }
    if closed_book is not None:
        found[CLOSED_BOOK] = [headed(row, closed_book.get(row["item_id"], "")).strip() for row in rows]
    return found


def profiles(inputs: Inputs) -> list[str]:
    """The template's profile of each user, in the order of the user table, from history alone."""
    unused = dict.fromkeys(inputs.items["item_id"].to_pylist(), "")  # a template names titles and genres alone
    users = inputs.users["user_id"].to_pylist()
    return describe(inputs.user_requests(users, unused), max_tokens=_PROFILE_TOKENS)


def describe(requests: Sequence[Request], *, max_tokens: int) -> list[str]:
    """What the template engine says to each request."""
    texts = [""] * len(requests)
    for place, answer in TemplateEngine().generate([request.prompt for request in requests], max_tokens=max_tokens):
        texts[place] = getattr(answer, "text", "")
    return texts


def inputs_of(settings: Settings, run_dir: Path, interactions: Path) -> Inputs:
    """Catalogue, pages and links of a run, with the interactions of one fold."""

    def path(stage: str, file: str) -> Path:
        return interactions if file == "interactions.parquet" else run_dir / stage / file

    where: InputPath = path
    return Inputs(settings, where)


class TextEncoder:
    """Texts to frozen vectors, each text once: what any fold or run has encoded before is taken from the folder."""

    def __init__(self, settings: EncodeSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder

    def encode(self, texts: Mapping[str, Sequence[str]]) -> dict[str, Vectors]:
        """Name -> (N, D) float32, one row a text.

        Raises:
            ConfigError: `encode.model` names no encoder.
            EngineError: the encoder cannot be loaded.
        """
        with Encoder(self._settings) as encoder:
            store = VectorStore(self._folder, encoder.encoder_id, encoder.dim)
            hashes = {
                name: [hashlib.sha256(text.encode()).hexdigest() for text in rows] for name, rows in texts.items()
            }
            new = {
                text_hash: text
                for name, rows in texts.items()
                for text_hash, text in zip(hashes[name], rows, strict=True)
                if text_hash not in store
            }
            order = list(new)
            with track("encode", len(order), "texts") as advance:
                for start in range(0, len(order), _SLICE):
                    part = order[start : start + _SLICE]
                    store.append(part, encoder.encode([new[text_hash] for text_hash in part], advance))
            return {name: store.gather(rows) for name, rows in hashes.items()}
