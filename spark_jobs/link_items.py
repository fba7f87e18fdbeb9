"""spark-submit driver: catalogue items to Wikipedia pages (`kellm_spark.linking`)."""

import argparse
import sys

from kellm_spark.linking import DOMAINS, link_items
from kellm_spark.session import submit
from kellm_spark.storage import read_table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--catalogue", required=True, help="Parquet or CSV with item_id, title and year")
parser.add_argument("--wiki", required=True, help="the folder that wiki_pages.py wrote")
parser.add_argument("--out", required=True, help="Parquet folder to write; must not exist")
parser.add_argument("--domain", choices=list(DOMAINS), default="movies")
parser.add_argument("--year-tolerance", type=int, default=1)
parser.add_argument("--min-similarity", type=float, default=0.9)

if __name__ == "__main__":
    options = vars(parser.parse_args())
    catalogue, wiki, out = (options.pop(name) for name in ("catalogue", "wiki", "out"))
    sys.exit(
        submit(
            lambda spark: link_items(read_table(spark, catalogue), read_table(spark, wiki), **options).write.parquet(
                out
            )
        )
    )
