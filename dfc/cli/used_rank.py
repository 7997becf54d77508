"""A rank's process that first loads what `--use` names, as the command did that started it.

python -m dfc.cli.used_rank FILE ... -- FOLDER RANK BORN HOST PORT
"""

from __future__ import annotations

import sys
from functools import partial


def main() -> None:
    from dfc.cli.options import load_used
    from dfc.runtime.pipeline import worker

    end = sys.argv.index("--")
    used, sys.argv[1:] = sys.argv[1:end], sys.argv[end + 1 :]
    worker.main(before=partial(load_used, used))


if __name__ == "__main__":
    main()
