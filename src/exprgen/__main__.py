"""``python -m exprgen``: see :mod:`exprgen.cli`."""

from __future__ import annotations

import sys

from exprgen.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
