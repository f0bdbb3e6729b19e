"""Which blocks this machine's node cache has in memory, asked as a client that only asks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from ucm.config.settings import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest, fingerprint, to_json
from ucm.store.blocks.page_key import page_key_of
from ucm.store.inspect.node_client import answer_of, connect_tool, most_keys
from ucm.store.node import protocol as p
from ucm.store.tiers.posix import paths

_ANSWER_S: Final = 10.0
_MAX_KEYS: Final = 1 << 14


def keys_in_memory(
    settings: StoreSettings, manifest: Manifest, keys: Sequence[Key], *, page_bytes: int
) -> frozenset[Key]:
    """Of `keys`, those that are in the memory of the node cache of these settings; none where there
    is no node cache, or where a backend has nothing of the namespace: a node cache would write a
    manifest. Raises ConfigError, ProtocolError, or NodeUnavailable
    where it doesn't answer."""
    name = fingerprint(manifest)
    page_key = page_key_of(settings.page_key_file)
    key_id = page_key.id if page_key is not None else b""
    homes = [paths.manifest_path(each, name, key_id) for each in settings.storage_backends]
    if not all(map(os.path.exists, homes)):
        return frozenset()
    namespace = p.OpenNamespace(
        ns=1,
        fingerprint=name,
        page_bytes=page_bytes,
        block_tokens=manifest.block_tokens,
        manifest=to_json(manifest),
    )
    try:
        client = connect_tool(settings, timeout_s=_ANSWER_S)
    except NodeUnavailable:
        return frozenset()
    with client:
        client.send(namespace)
        if answer_of(client, p.NamespaceOpened, timeout_s=_ANSWER_S).refused:
            return frozenset()
        found: set[Key] = set()
        most = min(_MAX_KEYS, most_keys(client.welcome))
        for start in range(0, len(keys), most):
            asked: list[bytes] = list(keys[start : start + most])
            timeout_ms = int(_ANSWER_S * 500)
            question = p.Find(
                id=start, ns=namespace.ns, keys=asked, storage=False, timeout_ms=timeout_ms
            )
            client.send(question)
            places = answer_of(client, p.Found, timeout_s=_ANSWER_S).places
            found |= {Key(key) for key, at in zip(asked, places, strict=True) if at & p.IN_MEMORY}
        return frozenset(found)
