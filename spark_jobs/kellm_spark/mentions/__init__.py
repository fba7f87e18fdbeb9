"""Articles to the pages that their titles mention, several per article."""

from kellm_spark.mentions.link import link_mentions

__all__ = ["link_mentions"]
