"""python -m structadapt: the command line."""

import sys

from structadapt.cli import main

if __name__ == "__main__":
    sys.exit(main())
