"""Backbones by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kellm_features.training.backbones.deepfm import DeepFM
from kellm_features.training.backbones.dien import DIEN
from kellm_features.training.backbones.din import DIN

BACKBONES: Mapping[str, type[DeepFM] | type[DIN] | type[DIEN]] = {"deepfm": DeepFM, "din": DIN, "dien": DIEN}


def build_backbone(
    name: str,
    fields: Mapping[str, str],
    tables: Mapping[str, int],
    field_dim: int,
    *,
    knowledge_dim: int,
    dropout: float,
) -> nn.Module:
    """A backbone with fresh weights from PyTorch's generator, called as `backbone(features, knowledge) -> logits (B,)`.

    Args:
        name: `deepfm`, `din` or `dien`.
        fields: field name -> table it looks up.
        tables: table name -> rows.
        field_dim: width of a row.
        knowledge_dim: K, total width of the knowledge vectors (`knowledge.knowledge_width`); 0 for none.
        dropout: in the DNN.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone={name!r}: {', '.join(map(repr, BACKBONES))} are accepted")
    return BACKBONES[name](fields, tables, field_dim, knowledge_dim=knowledge_dim, dropout=dropout)
