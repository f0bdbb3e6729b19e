"""Which versions of vLLM this connector runs on."""

from __future__ import annotations

import logging
import re
from typing import Final

from ucm.errors import UnsupportedEngine

logger = logging.getLogger(__name__)

# Before it vLLM does not tell a connector where the blocks of a request are, nor hears of one
# request whose load has failed.
OLDEST: Final = (0, 30)
NEWEST_TRIED: Final = (0, 32)


def check_version(version: str) -> None:
    """Raises UnsupportedEngine for one that is too old, and warns of one that is newer than what
    was tried. What has no number is taken for what somebody builds today."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return
    release = (int(found[1]), int(found[2]))
    if release < OLDEST:
        raise UnsupportedEngine(
            f"this is vLLM {version}, and UCM needs {_text(OLDEST)} or a later one: update vLLM"
        )
    if release > NEWEST_TRIED:
        logger.warning(
            "this is vLLM %s, and UCM was tried with versions up to %s",
            version,
            _text(NEWEST_TRIED),
        )


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
