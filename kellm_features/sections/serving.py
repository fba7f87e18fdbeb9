"""Sections of what is published and served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from kellm_features.sections.base import Section


class VerifySettings(Section):
    """Limits that a published version keeps before it is promoted; kellm_features.store.verify says what they mean."""

    min_coverage: Annotated[
        float, Field(ge=0, le=1, description="share of the active version's ids that the new one holds")
    ] = 0.95
    min_norm: Annotated[float, Field(ge=0, description="of every vector; 0 admits zero vectors")] = 1e-6
    max_norm: Annotated[float, Field(gt=0, description="of every vector")] = 1e3
    max_duplicates: Annotated[
        float, Field(ge=0, le=1, description="share of vectors that repeat another bit for bit")
    ] = 0.5
    max_mean_cosine: Annotated[
        float, Field(ge=-1, le=1, description="of two different ids; near 1 all vectors collapsed onto one direction")
    ] = 0.98
    max_centroid_drift: Annotated[
        float,
        Field(
            ge=0,
            le=2,
            description="cosine distance between the mean vectors of the ids in common with the active version; a "
            "retrained adapter of another seed has about 1, in a rotated space: 2 admits it, where every consumer is "
            "retrained with its version",
        ),
    ] = 0.5
    min_neighbor_overlap: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="mean share of an id's nearest neighbours by cosine that the active version gives it as well; "
            "a retrained adapter keeps about 0.3, vectors on the wrong ids 0.01",
        ),
    ] = 0.1
    neighbors: Annotated[int, Field(ge=1, le=100, description="nearest neighbours compared")] = 10
    sample: Annotated[int, Field(ge=1, le=100_000, description="ids read back from the online store per view")] = 500

    @model_validator(mode="after")
    def _norms_in_order(self) -> VerifySettings:
        if self.min_norm > self.max_norm:
            raise ValueError(f"min_norm = {self.min_norm:g} lies above max_norm = {self.max_norm:g}")
        return self


class StoreSettings(Section):
    """The Feast repository that serves the embeddings."""

    repo: Path = Path("feature_repo")
    version: Annotated[
        str | None,
        Field(description="name of the version; None: the export's", json_schema_extra={"tuning": True}),
    ] = None
    promote: Annotated[
        bool,
        Field(
            description="kellm run: promote a new version once it passed the gates", json_schema_extra={"tuning": True}
        ),
    ] = True
    grace_s: Annotated[
        float, Field(ge=0, description="prune leaves a version alone for this long after it stopped being active")
    ] = 600.0
    verify: VerifySettings = VerifySettings()
