"""Which versions of vLLM are tried with each other."""

from __future__ import annotations

# The version of the other tests is spelled as nothing.
BORDERS = ("", "0.28.0", "0.30.0")
# On a torch of its own, and as Python alone over the kernels of another version.
ENDS = ("", "0.23.0", "0.28.0", "0.30.0", "0.33.0")
# Left out by what must be green before a change is taken, for the time that they take.
BETWEEN = ("", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.29.0", "0.31.0")
