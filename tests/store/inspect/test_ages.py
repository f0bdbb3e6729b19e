"""Ages of pages, as `ucm du` counts them."""

from __future__ import annotations

import pytest

from ucm.store.inspect.contents import age_of


@pytest.mark.parametrize(
    ("age_s", "name"),
    [
        (-5, "hour"),
        (0, "hour"),
        (3600, "hour"),
        (3601, "day"),
        (6 * 86_400, "week"),
        (1e9, "older"),
    ],
)
def test_each_age_has_a_name(age_s: float, name: str) -> None:
    assert age_of(age_s) == name
