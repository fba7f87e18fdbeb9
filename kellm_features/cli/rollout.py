"""`kellm publish`, `verify`, `promote`, `rollback`, `prune` and `status`: versions in the online store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kellm_features.cli.app import app, stdout
from kellm_features.cli.run import ConfigOption, OutOption, SetOption, run_stage, settings_from
from kellm_features.settings import Settings

if TYPE_CHECKING:
    from kellm_features.store.rollout import Status

RepoOption = Annotated[Path | None, typer.Option("--repo", help="Feast repository. Default: store.repo.")]
VersionArgument = Annotated[str | None, typer.Argument(help="Version. Default: the one published last.")]


def settings_with_repo(config: Path | None, overrides: list[str] | None, repo: Path | None) -> Settings:
    """The settings of a command line, with the repository that `--repo` names."""
    settings = settings_from(config, overrides)
    if repo is None:
        return settings
    return settings.model_copy(update={"store": settings.store.model_copy(update={"repo": repo})})


@app.command()
def publish(
    version: Annotated[
        str | None, typer.Option("--version", help="Name of the version. Default: the export's.")
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Serve it at once if it passes the gates, as  kellm run  does.")
    ] = False,
    out: OutOption = Path("runs/default"),
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Write a run's embeddings as a new version beside what is served; promote serves it."""
    settings = settings_with_repo(config, overrides, repo)
    store = settings.store.model_copy(update={"promote": promote} | ({"version": version} if version else {}))
    run_stage("publish", settings.model_copy(update={"store": store}), out)
    _show_status(settings)


@app.command()
def verify(
    version: VersionArgument = None,
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Hold a published version against the gates of [store.verify]; exit code 1 where it fails."""
    from kellm_features.cli.rollout_tables import verification_table
    from kellm_features.store import rollout

    store = settings_with_repo(config, overrides, repo).store
    found = rollout.verify(store.repo, version, settings=store.verify)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        stdout.print(verification_table(found))
        stdout.print(f"\nversion {found.version} {'passes' if found.passed else 'fails'}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def promote(
    version: VersionArgument = None,
    force: Annotated[bool, typer.Option("--force", help="Serve it whatever the gates say.")] = False,
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Serve a version, from the next request on, if it passes the gates."""
    from kellm_features.store import rollout

    store = settings_with_repo(config, overrides, repo).store
    served = rollout.promote(store.repo, version, settings=store.verify, force=force)
    stdout.print(f"serving {served.name}", soft_wrap=True)


@app.command()
def rollback(repo: RepoOption = None, config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Serve the version again that was served before this one."""
    from kellm_features.store import rollout

    served = rollout.rollback(settings_with_repo(config, overrides, repo).store.repo)
    stdout.print(f"serving {served.name} again", soft_wrap=True)


@app.command()
def prune(
    keep: Annotated[int, typer.Option("--keep", help="Published versions to keep, beside the active one.")],
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Delete old and unfinished versions from the online store; partitions stay for training."""
    from kellm_features.store import rollout

    store = settings_with_repo(config, overrides, repo).store
    gone = rollout.prune(store.repo, keep, grace_s=store.grace_s)
    stdout.print(f"pruned {', '.join(gone) if gone else 'nothing'}", soft_wrap=True)


@app.command()
def status(
    repo: RepoOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The catalog as JSON.")] = False,
) -> None:
    """What the online store holds and serves."""
    settings = settings_with_repo(config, overrides, repo)
    if not as_json:
        _show_status(settings)
        return
    from pydantic import TypeAdapter

    from kellm_features.store.rollout import Status
    from kellm_features.store.rollout import status as read_status

    typer.echo(TypeAdapter(Status).dump_json(read_status(settings.store.repo), indent=2).decode())


def _show_status(settings: Settings) -> None:
    from kellm_features.store.rollout import status as read_status

    seen = read_status(settings.store.repo)
    stdout.print(status_table(seen))
    told = f"serving {seen.active} since {seen.since:%Y-%m-%d %H:%M:%S} UTC" if seen.active else "nothing is served"
    back = f"; a rollback serves {seen.previous}" if seen.previous else ""
    stdout.print(f"\n{told}{back}", soft_wrap=True)


def status_table(seen: Status) -> Table:
    """The versions of a store, newest first."""
    from kellm_features.cli.show import plain_table

    columns = ("version", "state", "gates", "items", "users", "length", "layout", "published (UTC)")
    right = ("items", "users", "length")
    table = plain_table(
        f"Versions in {seen.where}", *((name, "right" if name in right else "left") for name in columns)
    )
    for version in seen.versions:
        gates = {True: "passed", False: "failed", None: "-"}[version.verified]
        items, users = (version.rows.get(f"{entity}_knowledge_embedding") for entity in ("item", "user"))
        table.add_row(
            version.name,
            version.state,
            gates,
            f"{items:,}" if items is not None else "-",
            f"{users:,}" if users is not None else "-",
            str(version.dim),
            version.layout,
            f"{version.published_at:%Y-%m-%d %H:%M:%S}" if version.published_at else "-",
        )
    if not seen.versions:
        table.add_row("none", "-", "-", "-", "-", "-", "-", "-")
    return table
