"""Items to Wikipedia pages: by name, year and evidence, right or silent."""

from kellm_spark.linking.hooks import linkable_titles
from kellm_spark.linking.link import link_items
from kellm_spark.linking.options import DOMAINS, LinkOptions, Method
from kellm_spark.linking.overrides import overrides_frame

__all__ = [
    "DOMAINS",
    "LinkOptions",
    "Method",
    "link_items",
    "linkable_titles",
    "overrides_frame",
]
