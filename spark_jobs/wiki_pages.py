"""spark-submit driver: a MediaWiki dump to one row a page (`kellm_spark.dump`)."""

import argparse
import sys

from kellm_spark.dump import read_dump
from kellm_spark.session import submit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--dump", required=True, help=".xml or .xml.bz2, at the same path on every machine")
parser.add_argument("--out", required=True, help="Parquet folder to write; must not exist")

if __name__ == "__main__":
    options = parser.parse_args()
    sys.exit(submit(lambda spark: read_dump(spark, options.dump).write.parquet(options.out)))
