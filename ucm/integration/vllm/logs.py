"""Where an engine's lines go."""

from __future__ import annotations

import logging


def log_like_vllm() -> None:
    """vLLM configures its own loggers only; ours write where its do, at its level."""
    ours, theirs = logging.getLogger("ucm"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
