"""The object tier on a server that people run: all that it must do on the one of `make test`."""

from __future__ import annotations

import pytest

# Collected here, with this folder's `server`.
from tests.store.tiers.s3.test_process_tier import *  # noqa: F403

pytestmark = [pytest.mark.long, pytest.mark.cluster]
