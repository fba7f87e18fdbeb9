"""The item space before and after adaptation: the map, and the neighbours of well-known items."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from kellm_features.errors import ArtifactError
from kellm_features.report import neighbours
from kellm_features.report.charts import Label, fit_square, place_labels
from kellm_features.report.projection import project
from kellm_features.report.view import RunView

MAP_ITEMS = 4000
MAP_SIZE = 460
MAP_PAD = 12
COLOURS = 6
"""Hues of the colour-blind-safe palette (Okabe & Ito 2008) that read on white and on black; all else is grey."""
LABELLED = 8
LABEL_CHARACTERS = 28
GENRE_NEIGHBOURS = 10


@dataclass(frozen=True)
class MapPoint:
    """One item on the map: its number, its place, and what hovering shows."""

    number: int
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class MapGroup:
    """Items of one main genre."""

    name: str
    colour: int
    """0 is grey."""
    count: int
    points: tuple[MapPoint, ...]


@dataclass(frozen=True)
class Panel:
    """One of the two maps."""

    title: str
    groups: tuple[MapGroup, ...]
    labels: tuple[Label, ...]
    genre_agreement: float
    """Mean share of an item's nearest items (in the full space, not on the map) that share its main genre."""


@dataclass(frozen=True)
class EmbeddingMap:
    """Both maps with their common legend."""

    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, int, int], ...]
    """(genre, colour, items), most items first, the rest last."""
    shown: int
    items: int
    size: int
    k: int


@dataclass(frozen=True)
class Neighbourhoods:
    """Neighbour tables and how far both spaces agree with SWING."""

    rows: tuple[neighbours.NeighbourRow, ...]
    agreement: neighbours.Agreement
    swing_top: int


def embedding_map(view: RunView) -> EmbeddingMap:
    """Both spaces in two dimensions, the best-known items of each at the same numbers.

    Raises:
        ArtifactError: a stage has not run, or there are too few items for a map.
        MissingExtraError: scikit-learn is not installed.
    """
    served = set(neighbours.read_ids(view.file("export", "item_embeddings.parquet")))
    keys = [key for key in view.interactions if key in served][:MAP_ITEMS]
    if len(keys) < 4:
        raise ArtifactError(f"A map needs at least 4 items; {len(keys)} have an embedding.")
    genres = np.array([view.items[key].main_genre if key in view.items else "no genre" for key in keys], dtype=object)
    colour_of, legend = _colours(genres.tolist())
    texts = [_hover(view, key) for key in keys]
    panels, earlier = [], None
    for title, stage, column in (
        ("Before: encodings of the descriptions", "encode", "encoding"),
        ("After: adapted embeddings", "export", "embedding"),
    ):
        vectors = view.vectors(stage, column, keys)
        earlier = project(vectors, view.settings.run.seed, like=earlier)
        places = fit_square(earlier, MAP_SIZE, MAP_PAD)
        names = [_short(view.label(key)) for key in keys[:LABELLED]]
        panels.append(
            Panel(
                title,
                tuple(_groups(genres, colour_of, legend, places, texts)),
                tuple(place_labels(places[:LABELLED], names, MAP_SIZE)),
                _genre_agreement(vectors, genres),
            )
        )
    k = min(GENRE_NEIGHBOURS, len(keys) - 1)
    return EmbeddingMap(tuple(panels), tuple(legend), len(keys), len(served), MAP_SIZE, k)


def neighbourhoods(view: RunView) -> Neighbourhoods:
    """The five best-known items' neighbours on both sides, and the agreement with SWING over many items."""
    for stage in ("ingest", "swing", "encode", "export"):
        view.artifact(stage)
    top = view.settings.train.top_k
    rows = neighbours.neighbours_before_after(view.run_dir, swing_top=top)
    return Neighbourhoods(tuple(rows), neighbours.swing_agreement(view.run_dir, swing_top=top), top)


def _colours(genres: list[str]) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """Genre -> colour number, and the legend; genres beyond the palette share grey."""
    counts = sorted(Counter(genres).items(), key=lambda row: (-row[1], row[0]))
    kept = counts[:COLOURS]
    legend = [(genre, number, count) for number, (genre, count) in enumerate(kept, 1)]
    rest = counts[COLOURS:]
    if rest:
        legend.append(("other", 0, sum(count for _, count in rest)))
    return {genre: number for genre, number, _ in legend[: len(kept)]}, legend


def _groups(
    genres: np.ndarray,
    colour_of: dict[str, int],
    legend: list[tuple[str, int, int]],
    places: np.ndarray,
    texts: list[str],
) -> list[MapGroup]:
    """Points by colour, large groups first so that small ones are drawn above them."""
    colours = np.array([colour_of.get(genre, 0) for genre in genres])
    ordered = sorted(legend, key=lambda row: (row[1] != 0, -row[2]))
    return [
        MapGroup(
            name,
            colour,
            count,
            tuple(
                MapPoint(int(row), float(places[row, 0]), float(places[row, 1]), texts[row])
                for row in np.flatnonzero(colours == colour)
            ),
        )
        for name, colour, count in ordered
    ]


def _genre_agreement(vectors: np.ndarray, genres: np.ndarray) -> float:
    rows = np.arange(len(vectors))
    found, _ = neighbours.nearest(vectors, rows, rows.tolist(), GENRE_NEIGHBOURS)
    return float((genres[found] == genres[:, None]).mean())


def _hover(view: RunView, key: Any) -> str:
    item = view.items.get(key)
    return f"{item.label}: {', '.join(item.genres)}" if item and item.genres else view.label(key)


def _short(text: str) -> str:
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1].rstrip() + "…"
