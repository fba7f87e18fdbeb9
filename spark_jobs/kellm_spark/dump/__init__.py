"""A MediaWiki dump to one row a page: any edition, `.xml` or `.xml.bz2`, in parts or whole."""

from kellm_spark.dump.check import Site, check_dump, check_parts
from kellm_spark.dump.reading import read_dump
from kellm_spark.dump.streams import read_streams

__all__ = ["Site", "check_dump", "check_parts", "read_dump", "read_streams"]
