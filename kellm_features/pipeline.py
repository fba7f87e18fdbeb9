"""Run what is stale, in order: the one place that decides freshness, locks, measures and writes manifests."""

from __future__ import annotations

import fcntl
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kellm_features import __version__
from kellm_features.artifacts import (
    Artifact,
    Manifest,
    digest,
    hash_outputs,
    load_artifact,
    new_run_id,
    replace_stage,
    require_artifact,
    stamp_file,
    write_manifest,
)
from kellm_features.errors import ArtifactError, MissingExtraError
from kellm_features.settings import Settings
from kellm_features.stages import STAGE_NAMES, STAGES, StageContext, StageReport, StageSpec, stage_spec
from kellm_features.usage import measure

logger = logging.getLogger(__name__)
LOCK = ".lock"

EXTRA_OF_MODULE = {
    "pyspark": "spark",
    "numba": "spark",
    "lxml": "spark",
    "feast": "feast",
    "pandas": "feast",
    "torch": "train",
    "safetensors": "train",
    "tensorboard": "tensorboard",
    "sklearn": "report",
    "transformers": "llm",
    "gguf": "llm",
    "sentence_transformers": "encode",
    "huggingface_hub": "encode",
    "jinja2": "report",
    "openai": "openai",
    "tenacity": "openai",
    "vllm": "vllm",
}


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage in a run."""

    name: str
    ran: bool
    why: str
    """Why it ran, or "unchanged"."""
    artifact: Artifact


Listener = Callable[[str, str, "StageOutcome | None"], None]
"""Called as (stage, "start" | "done" | "fresh", outcome): the terminal's view of a run."""


def stages_between(first: str | None, last: str | None) -> list[StageSpec]:
    """The stages from `first` to `last`, both included, in order.

    Raises:
        ArtifactError: no such stage, or `first` comes after `last`.
    """
    start = STAGE_NAMES.index(stage_spec(first).name) if first else 0
    end = STAGE_NAMES.index(stage_spec(last).name) if last else len(STAGES) - 1
    if start > end:
        raise ArtifactError(f"--from {first} comes after --until {last}; the order is: {', '.join(STAGE_NAMES)}")
    return list(STAGES[start : end + 1])


def run_stages(
    settings: Settings,
    run_dir: Path,
    *,
    first: str | None = None,
    last: str | None = None,
    anew: bool = False,
    listener: Listener = lambda stage, event, outcome: None,
) -> list[StageOutcome]:
    """Run the stale stages of a range, with `anew` the fresh ones too; those before it must be finished and fresh.

    Raises:
        ArtifactError: an earlier stage is missing or stale, another run holds the directory, or splits differ.
        KellmError: whatever a stage found wrong with its input; earlier stages stay as they are.
    """
    wanted = stages_between(first, last)
    with locked(run_dir):
        for spec in STAGES[: STAGES.index(wanted[0])]:
            if any(spec.name in later.upstream for later in wanted):
                _require_fresh(spec, settings, run_dir, needed_by=wanted[0].name)
        outcomes = []
        try:
            for position, spec in enumerate(wanted):
                outcomes.append(_run_one(spec, settings, run_dir, listener, anew=anew))
                if spec.engine == "spark" and not any(later.engine == "spark" for later in wanted[position + 1 :]):
                    _stop_spark()
        finally:
            _stop_spark()
        return outcomes


def why_stale(spec: StageSpec, settings: Settings, run_dir: Path) -> str | None:
    """Why a stage has to run, or None where its artefact still holds and has left nothing to do.

    Raises:
        DataError: an external input is missing.
    """
    why = _why_outdated(spec, settings, run_dir)
    artifact = load_artifact(run_dir, spec.name)
    if why is not None or artifact is None or spec.check is None:
        return why
    left: str | None = _load(spec.check)(settings, artifact)
    return left


def _why_outdated(spec: StageSpec, settings: Settings, run_dir: Path) -> str | None:
    """Why an artefact's rows no longer are what the stage would write."""
    artifact = load_artifact(run_dir, spec.name)
    if artifact is None:
        return "not made yet"
    manifest = artifact.manifest
    if manifest.config_hash != settings.hash_of(spec.sections):
        return f"settings changed: {', '.join(_changed_keys(manifest, settings, spec)) or ', '.join(spec.sections)}"
    for name in spec.upstream:
        source = load_artifact(run_dir, name)
        if source is None:
            return f"'{name}' is not made yet"
        if manifest.inputs.get(name) != source.manifest.output_hash:
            return f"'{name}' changed"
    files = _input_files(spec, settings)
    if set(files) != set(manifest.files):
        return "other input files"
    for role, path in files.items():
        if stamp_file(path.resolve(), manifest.files[role]).sha256 != manifest.files[role].sha256:
            return f"{path.name} changed"
    gone = [name for name in manifest.outputs if not (artifact.path / name).exists()]
    return f"{gone[0]} is gone" if gone else None


def _run_one(spec: StageSpec, settings: Settings, run_dir: Path, listener: Listener, *, anew: bool) -> StageOutcome:
    why = why_stale(spec, settings, run_dir) or ("asked for" if anew else None)
    if why is None:
        outcome = StageOutcome(spec.name, False, "unchanged", require_artifact(run_dir, spec.name, spec.name))
        listener(spec.name, "fresh", outcome)
        return outcome
    listener(spec.name, "start", None)
    logger.info("%s: %s", spec.name, why)
    inputs = {name: require_artifact(run_dir, name, needed_by=spec.name) for name in spec.upstream}
    split_hash = _one_split(spec.name, inputs)
    work = run_dir / "work" / spec.name
    work.mkdir(parents=True, exist_ok=True)
    with replace_stage(run_dir, spec.name) as out:
        files = _input_files(spec, settings)
        stamps = {role: stamp_file(path.resolve()) for role, path in files.items()}
        ctx = StageContext(
            settings, run_dir, out, work, inputs, files, split_hash, previous=load_artifact(run_dir, spec.name)
        )
        with measure() as usage:
            report: StageReport = _load(spec.function)(ctx)
        outputs = hash_outputs(out)
        manifest = Manifest(
            stage=spec.name,
            run_id=new_run_id(),
            version=__version__,
            created=datetime.now(UTC),
            config={name: getattr(settings, name).model_dump(mode="json") for name in spec.sections},
            config_hash=settings.hash_of(spec.sections),
            inputs={name: artifact.manifest.output_hash for name, artifact in inputs.items()},
            files=stamps,
            split_hash=report.split_hash or split_hash,
            outputs=outputs,
            output_hash=digest(outputs),
            rows_in=report.rows_in,
            rows_out=report.rows_out,
            dropped=report.dropped,
            models=report.models,
            seconds=round(usage.seconds, 2),
            cpu_seconds=round(usage.cpu_seconds, 2),
            peak_mib=round(usage.peak_mib, 1),
            notes=report.notes,
        )
        write_manifest(out, manifest)
    outcome = StageOutcome(spec.name, True, why, Artifact(run_dir / spec.name, manifest))
    listener(spec.name, "done", outcome)
    return outcome


def _require_fresh(spec: StageSpec, settings: Settings, run_dir: Path, needed_by: str) -> None:
    require_artifact(run_dir, spec.name, needed_by)
    why = _why_outdated(spec, settings, run_dir)
    if why is not None:
        raise ArtifactError(
            f"'{needed_by}' would build on {run_dir / spec.name}, which no longer holds ({why}): "
            f"run  kellm run --out {run_dir} --from {spec.name}"
        )


def _one_split(stage: str, inputs: dict[str, Artifact]) -> str | None:
    """The split hash that all inputs share; inputs that know no split (a Wikipedia) do not count."""
    seen = {name: artifact.manifest.split_hash for name, artifact in inputs.items() if artifact.manifest.split_hash}
    if len(set(seen.values())) > 1:
        told = ", ".join(f"{name} {value[:12]}" for name, value in seen.items() if value)
        raise ArtifactError(
            f"'{stage}' was given artefacts of different splits ({told}): training on one split and testing on "
            f"another leaks; run  kellm run --from {next(iter(seen))}"
        )
    return next(iter(seen.values()), None)


def _input_files(spec: StageSpec, settings: Settings) -> dict[str, Path]:
    return dict(_load(spec.files)(settings)) if spec.files else {}


def _changed_keys(manifest: Manifest, settings: Settings, spec: StageSpec) -> Iterator[str]:
    for section in spec.sections:
        before = manifest.config.get(section, {})
        yield from _differences(section, before, settings.shaping(section))


def _differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Of the keys that shape rows: a manifest's settings hold the others too."""
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(f"{name}.{key}", old, value)
        elif old != value:
            yield f"{name}.{key} was {old!r}, is {value!r}"


def _load(target: str) -> Any:
    """Import `module:name`, telling which extra to install where a package is missing."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        if root in EXTRA_OF_MODULE:
            raise MissingExtraError(EXTRA_OF_MODULE[root], root, f"{module}.{name}") from error
        raise


def _stop_spark() -> None:
    if "kellm_spark.session" in sys.modules:
        _load("kellm_spark.session:stop_session")()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a directory: one run at a time; the kernel frees the lock when the process dies.

    A run that fails before it has finished anything leaves no directory behind.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ArtifactError(f"{run_dir} is a file: --out takes a directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = (run_dir / LOCK).open("w")
    except OSError as error:
        raise ArtifactError(f"{run_dir} cannot be written ({error.strerror}): choose another --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(
                f"another kellm run is working in {run_dir}: wait for it, or choose another --out"
            ) from error
        try:
            yield
        finally:
            _remove_if_empty(run_dir)


def _remove_if_empty(run_dir: Path) -> None:
    for folder in (*(run_dir / "work").glob("*"), run_dir / "work"):
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()
    if [path.name for path in run_dir.iterdir()] == [LOCK]:
        (run_dir / LOCK).unlink()
        run_dir.rmdir()
