"""spark-submit driver: `kellm publish-spark --items …`, with the same options, on the cluster that runs this."""

import sys

from kellm_features.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "publish-spark")
    main()
