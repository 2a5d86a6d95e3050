"""`python -m gqa_cutlass` is `gqa-cutlass`."""

from __future__ import annotations

from gqa_cutlass.cli import main

if __name__ == "__main__":
    main()
