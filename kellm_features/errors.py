"""Errors that a person can act on.

A message says what failed, the value that was seen, what is accepted, and what to do, in one line.
The command line prints that line and exits with 2; `--debug` adds the trace.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its kind where it says nothing."""
    return str(error).partition("\n")[0].strip() or type(error).__name__


class KellmError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 2


class ConfigError(KellmError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(KellmError):
    """An input file is missing, unreadable, or does not hold what its reader needs."""


class SchemaError(DataError):
    """A table lacks a column, or a column has another type than its schema declares."""


class ArtifactError(KellmError):
    """An artefact is missing, unfinished, stale, or was made from another split or config."""


class MissingExtraError(KellmError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, module: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the Python package '{module}', which is not installed: "
            f"run  pip install 'kellm-features[{extra}]'"
        )
        self.extra = extra
        self.module = module
        self._told = (extra, module, purpose)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), self._told  # from a worker process as it was raised there


class StoreError(KellmError):
    """The feature store refused an operation or holds something other than was asked for."""


class EvaluationError(KellmError):
    """An evaluation could not be finished."""


class EngineError(KellmError):
    """A text generation engine is unknown, cannot start, or failed for good."""
