"""A rank that takes long to start, where it is started in place of another one."""

from __future__ import annotations

import sys
import time

from dfc.runtime.pipeline.worker import main

if __name__ == "__main__":
    if int(sys.argv[3]) > 2:  # born after the first two
        time.sleep(3)
    main()
