"""The feature store: view factories, publishing, fetching and the repository's template.

Importing this package imports no Feast, torch, pyspark or vLLM: a serving process stays light.
"""
