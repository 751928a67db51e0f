"""`python -m gcfast` is the command `gcfast`."""

import sys

from gcfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
