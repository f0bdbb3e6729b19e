"""JSON with one spelling: what digests are made of."""

from __future__ import annotations

import json


def canonical_json(value: object) -> bytes:
    """The same bytes for the same JSON value, in every process, on every machine: keys sorted, no
    spaces, ASCII, floats in their shortest form. ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
