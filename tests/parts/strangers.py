"""Code that runs as a user who is neither root nor whoever the tests run as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STRANGER = 65534
_BECOME = f"import os; os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})"


def run_as_stranger(imports: str, code: str, store: Path) -> str:
    """`imports` run before, as files of the tests may be for their owner alone; `code` finds
    `store` as its first argument. Returns what it has logged. Only root can do this."""
    logged = "import logging, sys; logging.basicConfig()"
    done = subprocess.run(
        [sys.executable, "-c", f"{logged}; {imports}; {_BECOME}; {code}", str(store)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
