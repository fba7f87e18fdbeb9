"""The sections of the settings tree: every key with its type, range, default and meaning.

`kellm_features.settings` gathers them, and is where others take them from.
"""
