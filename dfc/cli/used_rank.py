"""A rank's process that first loads what `--use` names, as the command did that started it.

python -m dfc.cli.used_rank FILE ... -- FOLDER RANK BORN HOST PORT
"""

from __future__ import annotations

import sys


def main() -> None:
    from dfc.cli.extensions import load_extension
    from dfc.errors import DfcError
    from dfc.runtime.pipeline import worker

    end = sys.argv.index("--")
    used, sys.argv[1:] = sys.argv[1:end], sys.argv[end + 1 :]
    try:
        for name in used:
            load_extension(name)
    except DfcError as e:
        sys.exit(f"what --use names cannot be loaded: {e}")
    worker.main()


if __name__ == "__main__":
    main()
