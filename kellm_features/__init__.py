"""Knowledge embeddings for production recommenders, served as Feast feature views.

Importing this package stays light: torch, pyspark, feast and the language model are imported by the stage
that needs them, and the reader when it is asked for.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kellm_features.store.reader import EmbeddingReader, Embeddings

try:
    __version__ = version("kellm-features")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["EmbeddingReader", "Embeddings", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("EmbeddingReader", "Embeddings"):
        from kellm_features.store import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
