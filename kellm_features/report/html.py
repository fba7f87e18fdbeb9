"""The report of a run: one self-contained HTML page, made from whatever stages have finished."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kellm_features import __version__
from kellm_features.errors import ArtifactError, DataError, MissingExtraError
from kellm_features.report.sections import behaviour, knowledge, links, overview, review, serving, space
from kellm_features.report.view import RunView
from kellm_features.settings import Settings

TEMPLATES = Path(__file__).parent / "templates"
REPORT = "report.html"
SCRIPTS = ("report.js", "overrides.js", "review.js")
_STAMP = re.compile(r'<meta name="kellm-inputs" content="([0-9a-f]{64})">')

SECTIONS: dict[str, tuple[str, Callable[[RunView], Any]]] = {
    "stages": ("Stages", overview.stage_table),
    "links": ("Links to Wikipedia", links.coverage),
    "review": ("Links to check", review.link_review),
    "descriptions": ("Descriptions", knowledge.descriptions),
    "swing": ("Similarity from behaviour", behaviour.swing),
    "training": ("Training", behaviour.training),
    "map": ("Map of the items", space.embedding_map),
    "neighbours": ("Neighbours", space.neighbourhoods),
    "version": ("Version and gates", serving.published),
    "fetch": ("Fetch in code", overview.fetch),
    "manifest": ("Manifest", overview.manifests),
}


@dataclass(frozen=True)
class Section:
    """A section with what it shows, or one line on why it shows nothing."""

    key: str
    title: str
    data: Any = None
    missing: str | None = None


def write_report(run_dir: Path, settings: Settings) -> Path:
    """Write `RUN/report.html`, whole or not at all; a page that is up to date is left as it is.

    The page needs no network, and its content security policy allows none.

    Args:
        run_dir: the run; a stage without a finished artefact leaves one line in its section.
        settings: the resolved settings of the run.

    Returns:
        The page's path.

    Raises:
        ArtifactError: the directory holds no finished stage, or a manifest is unreadable.
        MissingExtraError: Jinja2 or scikit-learn is not installed.
    """
    view = RunView(run_dir, settings)
    if not view.artifacts:
        raise ArtifactError(f"{run_dir} holds no finished stage to report on: run  kellm run --out {run_dir}")
    target = run_dir / REPORT
    stamp = _stamp(view)
    if _stamp_of(target) == stamp:
        return target
    page = _render(view, stamp)
    temporary = run_dir / f".{REPORT}.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def _render(view: RunView, stamp: str) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", "jinja2", "the HTML report") from error
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # titles and page text come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": _thousands, "percent": _percent, "fixed": _fixed}
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("report.html.j2").render(
        run_name=view.run_dir.resolve().name,
        version=__version__,
        made=max(artifact.manifest.created for artifact in view.artifacts.values()),
        stamp=stamp,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=overview.headline(view),
        sections=[_section(view, key, title, build) for key, (title, build) in SECTIONS.items()],
    )


def _thousands(value: int) -> str:
    return f"{value:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _fixed(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def _section(view: RunView, key: str, title: str, build: Callable[[RunView], Any]) -> Section:
    try:
        return Section(key, title, data=build(view))
    except (ArtifactError, DataError) as error:
        return Section(key, title, missing=str(error))


def _stamp(view: RunView) -> str:
    """SHA-256 over everything that shapes the page: manifests, settings, overrides, the code and templates here."""
    digest = hashlib.sha256(view.settings.model_dump_json().encode())
    for artifact in view.artifacts.values():
        digest.update(artifact.manifest.model_dump_json().encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in {".py", ".j2", ".css", ".js"}:
            digest.update(path.read_bytes())
    digest.update(str(view.run_dir.resolve()).encode())
    overrides = view.settings.link.overrides
    if overrides is not None and overrides.is_file():  # edited since, it must not be saved from an older page
        digest.update(overrides.read_bytes())
    return digest.hexdigest()


def _stamp_of(page: Path) -> str | None:
    try:
        with page.open(encoding="utf-8") as handle:
            found = _STAMP.search(handle.read(2000))
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None
