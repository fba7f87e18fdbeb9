"""The application object, its global options, and how errors end."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from kellm_features import __version__
from kellm_features.errors import KellmError

app = typer.Typer(
    name="kellm",
    help="Knowledge embeddings for recommenders: from interactions and a Wikipedia dump to Feast feature views.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
INCOMPLETE = 3
"""Exit code of a run that did its work but for requests that failed: 2 is an error, after which nothing was written."""
PIPED_WIDTH = 110
"""Columns where the output is no terminal: a log file has no width of its own."""


def _console(stream: TextIO, *, stderr: bool) -> Console:
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    # Results carry titles, ids and paths, whose brackets are not markup; messages on stderr are our own.
    return Console(stderr=stderr, highlight=False, width=width, markup=stderr)


stderr = _console(sys.stderr, stderr=True)
stdout = _console(sys.stdout, stderr=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"kellm-features {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what each stage does.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    ctx.obj = {"debug": debug}
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=stderr, show_path=False, rich_tracebacks=False)],
    )
    ours = logging.DEBUG if debug else logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING
    logging.getLogger("feast").setLevel(logging.WARNING)  # it reports each refresh of its registry cache
    for name in ("kellm_features", "kellm_spark", "kellm_kernels"):
        logging.getLogger(name).setLevel(ours)
    if not debug:  # other libraries' deprecations are ours to read in the tests, not the user's at night
        warnings.filterwarnings("ignore")


def main() -> None:
    """Run the command line; a `KellmError` ends in one line and exit code 2."""
    for commands in (
        "doctor",
        "evaluate",
        "fetch",
        "generate",
        "generate_spark",
        "init",
        "link",
        "publish_spark",
        "rollout",
        "run",
        "serve",
        "swing",
        "train",
        "wiki",
    ):  # each registers its commands with `app`
        import_module(f"kellm_features.cli.{commands}")
    debug = "--debug" in sys.argv
    try:
        app()
    except KellmError as error:
        if debug:
            raise
        line = " ".join(str(error).splitlines())
        stderr.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stderr.print("\nstopped; finished stages are kept, and the next run goes on from there")
        sys.exit(130)
