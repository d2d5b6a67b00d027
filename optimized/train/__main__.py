"""`python -m optimized.train [TEXT ...]`: see `optimized.train`."""

import sys

from optimized.train.job import main

if __name__ == "__main__":
    sys.exit(main())
