"""The stages, what each one reads, and how one is run: the seam between the pipeline and the work.

A stage is a function `run(ctx: StageContext) -> StageReport` named here by its import path, so that listing the
stages imports none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kellm_features.artifacts import Artifact
from kellm_features.errors import ArtifactError
from kellm_features.settings import Settings


@dataclass(frozen=True)
class StageSpec:
    """One stage: its place in the graph and the settings that shape its rows."""

    name: str
    function: str
    """`module:function`, imported when the stage runs."""
    upstream: tuple[str, ...]
    sections: tuple[str, ...]
    files: str | None = None
    """`module:function` giving the external input files, `(Settings) -> dict[str, Path]`."""
    check: str | None = None
    """`module:function` for a stage that may have more to do though its inputs are unchanged, because its effect
    reaches beyond its folder or its last run left something: `(Settings, Artifact) -> str | None`, what that is.
    Later stages build on its rows all the same."""
    engine: str | None = None
    """`spark` keeps one session for neighbouring stages."""


STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        "ingest",
        "kellm_features.data.ingest:run",
        (),
        ("run", "data"),
        "kellm_features.data.ingest:input_files",
    ),
    StageSpec("swing", "kellm_spark.stages:run_swing", ("ingest",), ("swing",), engine="spark"),
    StageSpec("wiki", "kellm_spark.stages:run_wiki", (), ("wiki",), "kellm_spark.stages:wiki_files", engine="spark"),
    StageSpec(
        "link",
        "kellm_spark.stages:run_link",
        ("ingest", "wiki"),
        ("link",),
        "kellm_spark.stages:link_files",
        engine="spark",
    ),
    StageSpec(
        "generate",
        "kellm_features.knowledge.generate:run",
        ("ingest", "wiki", "link"),
        ("run", "history", "generate"),
        "kellm_features.knowledge.generate:input_files",
        check="kellm_features.knowledge.generate:why_unfinished",
    ),
    StageSpec(
        "encode",
        "kellm_features.knowledge.encode:run",
        ("ingest", "generate"),
        ("encode",),
        "kellm_features.knowledge.encode:input_files",
    ),
    StageSpec("train", "kellm_features.training.stage:run", ("ingest", "swing", "encode"), ("run", "history", "train")),
    StageSpec("export", "kellm_features.training.export:run", ("encode", "train"), ()),
    StageSpec(
        "publish",
        "kellm_features.store.stage:run",
        ("ingest", "swing", "link", "generate", "export"),
        (),
        check="kellm_features.store.stage:why_stale",
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_spec(name: str) -> StageSpec:
    """The stage of that name.

    Raises:
        ArtifactError: there is none.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ArtifactError(f"there is no stage {name!r}; the stages are: {', '.join(STAGE_NAMES)}")


@dataclass(frozen=True)
class StageContext:
    """What a stage gets: settings, finished inputs, an empty folder for its outputs, a folder that stays."""

    settings: Settings
    run_dir: Path
    out: Path
    """Empty; becomes the artefact when the stage returns."""
    work: Path
    """Kept across kills and runs: finished pieces of a long stage live here under content hashes."""
    inputs: dict[str, Artifact]
    files: dict[str, Path]
    split_hash: str | None
    """Hash of the split; the `ingest` stage itself sets it through its report."""
    previous: Artifact | None = None
    """The stage's own artefact of an earlier run, whose unchanged rows may be taken over."""

    def input(self, stage: str, name: str) -> Path:
        """The path of an upstream output, e.g. `ctx.input("ingest", "items.parquet")`."""
        return self.inputs[stage].file(name)


@dataclass(frozen=True)
class StageReport:
    """What a stage says of its work; the pipeline makes the manifest of it."""

    rows_in: int
    rows_out: int
    dropped: dict[str, int] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    split_hash: str | None = None
    """Set by `ingest` alone."""
