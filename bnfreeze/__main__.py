"""`python -m bnfreeze`: the command."""

import sys

from bnfreeze.cli import main

if __name__ == "__main__":
    sys.exit(main())
