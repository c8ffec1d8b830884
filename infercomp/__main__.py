"""``python -m infercomp`` is the ``infercomp`` command."""

from __future__ import annotations

from infercomp.cli import main

if __name__ == "__main__":
    main()
