"""`python -m dfc`: the command of the environment whose Python runs it."""

from __future__ import annotations

import sys

from dfc.cli import main

if __name__ == "__main__":
    sys.exit(main())
