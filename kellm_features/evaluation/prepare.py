"""From data, dump and descriptions to a world: the run that links, the folds, their pairs, and the frozen vectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kellm_features.errors import ConfigError, DataError, first_line
from kellm_features.evaluation.protocol import Fold, cold_fold, kar_fold, time_fold, user_folds
from kellm_features.evaluation.texts import (
    DIGEST,
    PAGE,
    TITLE,
    TextEncoder,
    inputs_of,
    item_texts,
    profiles,
    read_descriptions,
)
from kellm_features.evaluation.world import FoldFiles, World, content_hash, prepare_fold, save_vectors
from kellm_features.pipeline import Listener, run_stages
from kellm_features.progress import track
from kellm_features.schemas import INTERACTIONS, ITEMS, USERS, read_table
from kellm_features.settings import Settings, SwingSettings

logger = logging.getLogger(__name__)

RUN = "run"
LEAST_COVERAGE = 0.5
"""Share of items with a text of a variant, below which its arms say little of it."""


def with_data(settings: Settings, data: Path | None, wiki: Path | None) -> Settings:
    """Settings that read a folder of MovieLens, or a table, and a dump.

    A folder with `movies.dat` is MovieLens-1M's, one with `movies.csv` MovieLens latest's; an `interactions.parquet` in
    it wins over the ratings. Where that has a column `timestamp_coarse`, its clock cannot tell what came first: ties at
    the end of a history are shuffled.

    Raises:
        DataError: the folder is not there.
        ConfigError: it holds no catalogue that is known.
    """
    changes: dict[str, Any] = {}
    if data is not None:
        if not data.is_dir():
            raise DataError(f"--data {data} is not a folder: name the unpacked release of MovieLens")
        formats = {"movies.dat": "movielens-1m", "movies.csv": "movielens-latest", "u.item": "movielens-100k"}
        known = [name for file, name in formats.items() if (data / file).exists()]
        if not known:
            raise ConfigError(
                f"--data {data} holds none of {', '.join(formats)}: for other tables leave --data out and name them "
                "under [data] in --config"
            )
        changes["data"] = {
            "format": known[0],
            "path": data.resolve(),
            "interactions": None,
            "items": None,
            "users": None,
        }
        table = data / "interactions.parquet"
        if table.exists():
            changes["data"]["interactions"] = table.resolve()
            if "timestamp_coarse" in _columns(table):
                changes["history"] = {"ties": "shuffle"}
    if wiki is not None:
        changes["wiki"] = {"dump": wiki.resolve()}
    # Digests and profiles of all folds are templates: they are made here, from the same facts for all arms.
    changes["generate"] = {"engine": "template", "fallback_engine": "template", "user_engine": "template"}
    tree = settings.model_dump()
    for section, values in changes.items():
        tree[section] = tree[section] | values
    return Settings.model_validate(tree)


def _check_swing(swing: SwingSettings) -> None:
    """Pairs are of all likes in a fold's train rows: what else [swing] can say is refused, not passed over."""
    plain = SwingSettings()
    for name in SwingSettings.model_fields:
        value = getattr(swing, name)
        if name not in ("preset", "top_k", "mode") and value != getattr(plain, name):
            raise ConfigError(
                f"swing.{name} = {value!r} has no effect on kellm evaluate, which takes swing.preset and swing.top_k: "
                "leave it out"
            )


def _columns(table: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(table).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} is not readable Parquet: {first_line(error)}") from error
    return names


def prepare(
    settings: Settings,
    suite: Literal["ctr", "cold", "all"],
    out: Path,
    *,
    descriptions: Path | None,
    listener: Listener,
) -> World:
    """Make, or take over, everything that the trainings of a suite read.

    Args:
        settings: see `with_data`.
        suite: which folds are wanted.
        out: of the evaluation; what is there of the same inputs is not made again.
        descriptions: closed-book texts; None: no such arms.
        listener: of the run's stages.

    Raises:
        KellmError: what the stages find wrong with their input; descriptions that are about other items.
    """
    _check_swing(settings.swing)
    run_dir = out / RUN
    run_stages(settings, run_dir, first="ingest", last="ingest", listener=listener)
    run_stages(settings, run_dir, first="wiki", last="link", listener=listener)
    paths = {name: run_dir / "ingest" / f"{name}.parquet" for name in ("interactions", "items", "users")}
    interactions = read_table(paths["interactions"], INTERACTIONS)
    items = read_table(paths["items"], ITEMS)["item_id"].to_pylist()
    users = read_table(paths["users"], USERS)["user_id"].to_pylist()
    closed_book = None if descriptions is None else read_descriptions(descriptions, items)
    encoder = TextEncoder(settings.encode, out / "encodings")
    inputs = inputs_of(settings, run_dir, paths["interactions"])
    texts = item_texts(inputs, closed_book)
    item_vectors = {name: save_vectors(out / "vectors", vectors) for name, vectors in encoder.encode(texts).items()}
    folds = {}
    wanted = _folds(settings, suite, interactions)
    with track("folds", len(wanted), "folds") as advance:
        for fold in wanted:
            content = content_hash(fold, (paths["items"], paths["users"]))
            folder = prepare_fold(out, fold, settings, items, users, content)
            of_fold = settings.model_copy(update={"data": settings.data.model_copy(update={"split": fold.split})})
            texts_of_users = profiles(inputs_of(of_fold, run_dir, folder / "interactions.parquet"))
            vectors = encoder.encode({"user": texts_of_users})["user"]
            folds[fold.name] = FoldFiles(
                folder=folder,
                name=fold.name,
                split=fold.split,
                select_on=fold.select_on,
                split_hash=fold.split_hash,
                content_hash=content,
                user_vectors=save_vectors(out / "vectors", vectors),
            )
            advance(1, fold.name)
    coverage = coverage_of(texts, [bool(inputs.pages.get(item_id)) for item_id in items])
    for name, share in coverage.items():
        if share < LEAST_COVERAGE:
            logger.warning("only %.0f %% of the items have a text of the variant %r", 100 * share, name)
    return World(out, run_dir, settings, item_vectors, folds, coverage)


def coverage_of(texts: Mapping[str, Sequence[str]], has_page: Sequence[bool]) -> dict[str, float]:
    """Variant -> share of the items that have more of it than title and genres.

    Digest and page are there where a page is: without one, a digest is a sentence that the template says of any item.

    Args:
        texts: variant -> the text of each item, titles among them.
        has_page: of each item.
    """
    there = {
        name: has_page
        if name in (DIGEST, PAGE)
        else [text != title for text, title in zip(rows, texts[TITLE], strict=True)]
        for name, rows in texts.items()
        if name != TITLE
    }
    return {name: sum(flags) / len(flags) for name, flags in there.items()}


def _folds(settings: Settings, suite: str, interactions: Any) -> list[Fold]:
    evaluate, seed = settings.evaluate, settings.run.seed
    folds: list[Fold] = []
    if suite in ("ctr", "all"):
        folds += user_folds(interactions, seed=seed)[: evaluate.folds]
        folds += [kar_fold(interactions), time_fold(interactions)]
    if suite in ("cold", "all"):
        folds += [
            cold_fold(interactions, share=evaluate.cold_share, fold=number, seed=seed)
            for number in range(evaluate.cold_folds)
        ]
    return folds
