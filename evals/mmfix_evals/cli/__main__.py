"""``python -m mmfix_evals.cli``."""

import sys

from mmfix_evals.cli import main

if __name__ == "__main__":
    sys.exit(main())
