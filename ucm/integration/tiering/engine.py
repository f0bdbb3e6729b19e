"""What a tier needs to know of the engine around it, which vLLM tells its connector alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ucm.errors import UnsupportedEngine

if TYPE_CHECKING:
    from ucm.integration.tiering.promises import Promising


@dataclass
class Engine:
    """`tiers` are those that were made for it."""

    vllm_config: Any
    kv_cache_config: Any
    tiers: list[Promising] = field(default_factory=list)


_being_made: ContextVar[Engine | None] = ContextVar("ucm_tiering_engine", default=None)


@contextmanager
def making(engine: Engine) -> Iterator[None]:
    """Tiers that are made meanwhile are this engine's."""
    token = _being_made.set(engine)
    try:
        yield
    finally:
        _being_made.reset(token)


def engine_of_tier() -> Engine:
    """Raises UnsupportedEngine."""
    engine = _being_made.get()
    if engine is None:
        raise UnsupportedEngine(
            "UcmTier can't tell which model this is: vLLM's OffloadingConnector does not pass that "
            "on to its tiers. Use our own, which is the same and does: kv_connector "
            "UCMOffloadingConnector, kv_connector_module_path ucm.integration.tiering.connector"
        )
    return engine
