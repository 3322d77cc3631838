"""``python -m inprocess``: a worker that runs whole configurations, handed to it as lines of JSON (``serve``)."""

from __future__ import annotations

import os
import sys


def main(argv: list[str]) -> None:
    if argv:
        print(f"error: python -m inprocess takes no arguments, got {' '.join(argv)}", file=sys.stderr)
        sys.exit(2)
    # Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from inprocess.serve import serve

    sys.exit(serve())


if __name__ == "__main__":
    main(sys.argv[1:])
