"""The command `kellm`."""

from kellm_features.cli.app import main

__all__ = ["main"]
