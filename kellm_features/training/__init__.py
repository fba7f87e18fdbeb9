"""Training: SWING pairs → batches, the adapter, its losses, backbones, the trainer, and the export of embeddings.

What a trainer of their own imports is here, and loaded when it is asked for: processes that only prepare batches need
none of it. The stages are `stage.run` (train) and `export.run`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kellm_features.errors import MissingExtraError

if TYPE_CHECKING:
    from kellm_features.training.adapter import Adapter
    from kellm_features.training.backbones import DIEN, DIN, DeepFM
    from kellm_features.training.experts import HybridExperts
    from kellm_features.training.knowledge import KnowledgeAugmented, Side
    from kellm_features.training.losses import AdapterInfoNCE

for _module in ("torch", "safetensors", "pandas"):
    if find_spec(_module) is None:
        raise MissingExtraError("train", _module, "Training")

__all__ = ["DIEN", "DIN", "Adapter", "AdapterInfoNCE", "DeepFM", "HybridExperts", "KnowledgeAugmented", "Side"]

_HOMES = {
    "Adapter": "adapter",
    "AdapterInfoNCE": "losses",
    "DIEN": "backbones",
    "DIN": "backbones",
    "DeepFM": "backbones",
    "HybridExperts": "experts",
    "KnowledgeAugmented": "knowledge",
    "Side": "knowledge",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
