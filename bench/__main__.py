"""`python -m bench` is `gqa-cutlass bench`, for `make bench PYTHON=...`."""

from __future__ import annotations

import sys

from gqa_cutlass.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
