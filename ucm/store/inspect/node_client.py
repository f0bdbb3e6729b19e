"""A node cache's client that only asks, for tools."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from typing import Final, TypeVar

from ucm.config.settings import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.client.connection import NodeClient
from ucm.store.node import protocol as p
from ucm.store.node.trusted_users import trust_of

_SESSION: Final = "tool-"
_LIMITS: Final = ("node_cache_max_keys", "node_cache_max_open_keys")
# What a node cache takes at the least.
_FEWEST_KEYS: Final = 1023
_Answer = TypeVar("_Answer", bound=p.NodeMessage)


def tool_session() -> str:
    """A name for a session of one's own."""
    return f"{_SESSION}{os.getpid()}-{uuid.uuid4().hex}"


def is_tool(session: str) -> bool:
    return session.startswith(_SESSION)


def connect_tool(settings: StoreSettings, *, timeout_s: float) -> NodeClient:
    """Raises NodeUnavailable, ConfigError or ProtocolError."""
    return NodeClient.connect(
        settings.socket_path,
        session=tool_session(),
        role="tool",
        timeout_s=timeout_s,
        trust=trust_of(settings),
    )


def most_keys(welcome: p.Welcome) -> int:
    """In one question: who asks about more is dropped."""
    # An open one weighs a key more than it has.
    given = (welcome.settings.get(name) for name in _LIMITS)
    return min((limit - 1 for limit in given if isinstance(limit, int)), default=_FEWEST_KEYS)


def most_open_keys(welcome: p.Welcome) -> int:
    """In all questions whose answers are not given back."""
    given = welcome.settings.get("node_cache_max_open_keys")
    return given if isinstance(given, int) else _FEWEST_KEYS + 1


def first_answer(
    client: NodeClient, is_it: Callable[[p.NodeMessage], bool], *, timeout_s: float
) -> p.NodeMessage | None:
    """The first message that `is_it` takes; None if there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        for message in client.poll(left_s):
            if is_it(message):
                return message
    return None


def answer_of(client: NodeClient, kind: type[_Answer], *, timeout_s: float) -> _Answer:
    """The first message of this kind. Raises NodeUnavailable if there is none in time."""
    answer = first_answer(client, lambda message: isinstance(message, kind), timeout_s=timeout_s)
    if not isinstance(answer, kind):
        raise NodeUnavailable(f"the node cache (pid {client.welcome.pid}) does not answer")
    return answer
