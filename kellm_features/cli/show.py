"""The closing tables of a run, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from kellm_features.pipeline import StageOutcome
from kellm_features.settings import Settings
from kellm_features.stages import stage_spec

if TYPE_CHECKING:
    from kellm_features.report.neighbours import Neighbour
    from kellm_features.store.reader import Embeddings
    from kellm_features.usage import Usage

HEAD = 4
"""Components of a vector that are printed."""


def plain_table(title: str, *columns: tuple[str, JustifyMethod]) -> Table:
    """A table without lines, whose columns keep their width."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def add_usage(table: Table, usage: Usage, *, embedded: bool, seconds: str = "seconds") -> None:
    """Close a job's table with what it cost.

    Args:
        table: of two columns.
        usage: measured.
        embedded: whether Spark ran in this process's tree; elsewhere its processes are not ours to count.
        seconds: what the time is called.
    """
    table.add_row(seconds, f"{usage.seconds:,.1f}")
    if embedded:
        table.add_row("CPU seconds, all processes", f"{usage.cpu_seconds:,.1f}")
        table.add_row("peak MiB, all processes", f"{usage.peak_mib:,.0f}")


def stage_table(outcomes: list[StageOutcome]) -> Table:
    """Stages with rows in, out and dropped, seconds and memory; times of a skipped stage are its last run's."""
    table = plain_table(
        "Stages",
        ("stage", "left"),
        ("rows in", "right"),
        ("rows out", "right"),
        ("dropped", "right"),
        ("seconds", "right"),
        ("CPU s", "right"),
        ("peak MiB", "right"),
        ("", "left"),
    )
    for outcome in outcomes:
        manifest = outcome.artifact.manifest
        table.add_row(
            outcome.name,
            f"{manifest.rows_in:,}",
            f"{manifest.rows_out:,}",
            f"{sum(manifest.dropped.values()):,}",
            f"{manifest.seconds:.1f}",
            f"{manifest.cpu_seconds:.1f}",
            f"{manifest.peak_mib:,.0f}",
            "" if outcome.ran else "skipped: unchanged",
            style="" if outcome.ran else "dim",
        )
        for reason, rows in manifest.dropped.items():
            table.add_row("", "", "", f"{rows:,}", "", "", "", reason, style="dim")
    return table


def plan_table(plan: list[tuple[str, str | None]]) -> Table:
    """What a run would do, stage by stage."""
    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage")
    table.add_column("would")
    table.add_column("why")
    running: set[str] = set()
    for name, why in plan:
        after = [source for source in stage_spec(name).upstream if source in running]
        if why is None and after:
            table.add_row(name, "run if they change", f"after {', '.join(after)}")
            running.add(name)
        elif why is None:
            table.add_row(name, "skip", "unchanged", style="dim")
        else:
            table.add_row(name, "run", why)
            running.add(name)
    return table


def neighbour_table(run_dir: Path, count: int = 5) -> Table:
    """The five best-known items' neighbours by raw encoding and by adapted embedding."""
    from kellm_features.report.neighbours import neighbours_before_after

    title = "Nearest neighbours before and after adaptation (• = one of the item's top SWING neighbours)"
    table = Table(title=title, title_justify="left", box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("item", overflow="fold", width=20)
    table.add_column("before: encoding of its text", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column("after: adapted embedding", overflow="ellipsis", no_wrap=True, ratio=1)
    for row in neighbours_before_after(run_dir, k=count):
        table.add_row(
            row.title,
            "\n".join(_neighbour(near) for near in row.before),
            "\n".join(_neighbour(near) for near in row.after),
        )
    return table


def _neighbour(near: Neighbour) -> str:
    return f"{'•' if near.is_swing else ' '} {near.cosine:.2f} {near.title}"


def fetched_vector(settings: Settings, run_dir: Path) -> RenderableType:
    """One embedding fetched back from the online store, and the code that fetches it."""
    from kellm_features.report.neighbours import best_known_items
    from kellm_features.store.reader import EmbeddingReader

    item_id = best_known_items(run_dir, 1)[0]
    with EmbeddingReader.from_repo(settings.store.repo) as reader:
        fetched = reader.get([item_id])
    key = repr(item_id)
    code = (
        "from kellm_features import EmbeddingReader\n\n"
        f'reader = EmbeddingReader.from_repo("{settings.store.repo}")\n'
        f"reader.get([{key}]).values  # (1, {fetched.values.shape[1]}) float32\n\n"
        "from feast import FeatureStore\n\n"
        f'store = FeatureStore("{settings.store.repo}")\n'
        f'store.get_online_features(["item_knowledge_embedding:embedding"], [{{"item_id": {key}}}]).to_dict()'
    )
    return Group(
        Text("\nOne embedding, fetched back from the online store", style="italic"),
        vector_table([item_id], fetched),
        Text("\nThe same in code\n", style="italic"),
        Text(code, no_wrap=True, overflow="ignore"),
        Text(f"\nor:  kellm fetch {item_id} --repo {settings.store.repo}", no_wrap=True, overflow="ignore"),
    )


def vector_table(ids: Sequence[int | str], fetched: Embeddings) -> Table:
    """Ids, found flags, version, age and the first components of fetched embeddings."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, width in (("id", 4), ("found", 5), ("version", len(fetched.version)), ("age", 6)):
        table.add_column(name, no_wrap=True, min_width=width)
    table.add_column("embedding", no_wrap=True)
    for key, found, age_s, vector in zip(ids, fetched.found, fetched.age_s, fetched.values, strict=True):
        if not found:
            table.add_row(str(key), "no", "-", "-", "-")
            continue
        head = " ".join(f"{value:+.4f}" for value in vector[:HEAD])
        more = f" … ({len(vector)})" if len(vector) > HEAD else ""
        table.add_row(str(key), "yes", fetched.version, age(float(age_s)), head + more)
    return table


def age(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
