"""`python -m dfc.cli`, and `torchrun -m dfc.cli`: the command without its script."""

from __future__ import annotations

import sys

from dfc.cli import main

if __name__ == "__main__":
    sys.exit(main())
