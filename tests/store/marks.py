"""Marks of tests that import Feast."""

import pytest

FEAST = [
    pytest.mark.feast,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # feast and ibis call what newer releases deprecate
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # feast leaves connections to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the same, told by the collector
    pytest.mark.filterwarnings("ignore:The spark data source API is an experimental feature:RuntimeWarning"),
]
KINDS = ("sqlite", "redis", "packed")
"""Online stores that every promise is tested on: SQLite, Redis in Feast's layout, Redis in the packed one."""
