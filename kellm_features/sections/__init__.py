"""The sections of the settings tree: every key with its type, range, default and meaning."""

from kellm_features.sections.base import Section
from kellm_features.sections.data import (
    ColumnMap,
    DataSettings,
    HistorySettings,
    LinkSettings,
    RunSettings,
    SparkSettings,
    SwingSettings,
    WikiSettings,
)
from kellm_features.sections.knowledge import EncodeSettings, GenerateSettings, ServerSettings, VllmSettings
from kellm_features.sections.serving import StoreSettings, VerifySettings
from kellm_features.sections.training import EvaluateSettings, TrainSettings

__all__ = [
    "ColumnMap",
    "DataSettings",
    "EncodeSettings",
    "EvaluateSettings",
    "GenerateSettings",
    "HistorySettings",
    "LinkSettings",
    "RunSettings",
    "Section",
    "ServerSettings",
    "SparkSettings",
    "StoreSettings",
    "SwingSettings",
    "TrainSettings",
    "VerifySettings",
    "VllmSettings",
    "WikiSettings",
]
