"""`python -m optimized [FILE]`: see `optimized.prove`."""

import sys

from optimized.prove.job import main

if __name__ == "__main__":
    sys.exit(main())
