"""spark-submit driver: `kellm generate-spark --side …`, with the same options, on the cluster that runs this."""

import sys

from kellm_features.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate-spark")
    main()
