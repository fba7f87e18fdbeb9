"""Knowledge embeddings for production recommenders, served as Feast feature views.

Importing this package stays light: torch, pyspark, feast and the language model are imported by the stage
that needs them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kellm-features")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
