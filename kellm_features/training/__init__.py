"""Training: SWING pairs → batches, the adapter, its losses, backbones, the trainer, and the export of embeddings.

What a trainer of their own imports: `adapter.Adapter`, `losses.AdapterInfoNCE`, `knowledge.KnowledgeAugmented`,
`backbones.DeepFM`. The stages are `stage.run` (train) and `export.run`.
"""

from importlib.util import find_spec

from kellm_features.errors import MissingExtraError

for _module in ("torch", "safetensors", "pandas"):
    if find_spec(_module) is None:
        raise MissingExtraError("train", _module, "Training")
