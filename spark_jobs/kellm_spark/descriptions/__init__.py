"""Descriptions and profiles over Spark: rows in shards, one engine per Python worker, nothing asked twice."""

from kellm_spark.descriptions.job import GenerateJob, run_generate_job
from kellm_spark.descriptions.shards import Side

__all__ = ["GenerateJob", "Side", "run_generate_job"]
