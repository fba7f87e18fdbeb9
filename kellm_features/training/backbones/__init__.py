"""CTR backbones, from their papers' equations.

A backbone is any module called as `backbone(features, knowledge) -> logits (B,)`: `features` is what the trainer's
data yields, `knowledge` the adapted vectors of the example, (B, K), or None for a model without text.
"""

from kellm_features.training.backbones.build import build_backbone
from kellm_features.training.backbones.deepfm import DeepFM
from kellm_features.training.backbones.dien import DIEN
from kellm_features.training.backbones.din import DIN

__all__ = ["DIEN", "DIN", "DeepFM", "build_backbone"]
