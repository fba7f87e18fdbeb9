"""spark-submit driver: SWING pairs of a table of interactions (`kellm_spark.swing`)."""

import argparse
import sys

from kellm_spark.session import read_table, submit
from kellm_spark.swing import PRESETS, swing_pairs

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--interactions", required=True, help="Parquet or CSV with user_id and item_id")
parser.add_argument("--out", required=True, help="Parquet folder to write; must not exist")
parser.add_argument("--side", choices=["item", "user"], required=True)
parser.add_argument("--preset", choices=list(PRESETS), default="pai-rec")
parser.add_argument("--alpha", type=float)
parser.add_argument("--alpha1", type=float)
parser.add_argument("--beta", type=float)
parser.add_argument("--top-k", type=int, default=100)
parser.add_argument("--min-user-items", type=int, default=1)
parser.add_argument("--max-user-items", type=int)

if __name__ == "__main__":
    options = vars(parser.parse_args())
    source, out = options.pop("interactions"), options.pop("out")
    sys.exit(submit(lambda spark: swing_pairs(read_table(spark, source), **options).write.parquet(out)))
