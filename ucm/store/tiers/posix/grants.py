"""How much each node may write of what a limit leaves. Pure.

Every node cache says, with each beat and in a file of its own, how much it has written since it
began and how far it may go. Who holds the lease adds that to what it has counted, and grants more:
what is left of the limit, in equal parts. What was granted is never taken back while its node
lives, for it may be written this very moment. So for each account

    counted + written since + granted and not written  <=  limit

A node that falls silent counts as having written all that it was granted, until the store is
counted anew; it stops by itself when its beats don't get through.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class NodeAccount(msgspec.Struct, frozen=True, array_like=True):
    """Of one account at one node. `up_to_bytes`: None before anything was granted."""

    written_bytes: int
    up_to_bytes: int | None


class NodeNote(msgspec.Struct, frozen=True):
    """What a node says. `beat` grows while it lives. `refused`: the accounts that its writers were
    refused for since the beat before."""

    beat: int
    accounts: dict[str, NodeAccount]
    refused: list[str] = []


class GrantsNote(msgspec.Struct, frozen=True):
    """What the holder of the lease says: by node, by account, how far it may go; and what is used
    of each account, for people."""

    beat: int
    used_bytes: dict[str, int]
    up_to_bytes: dict[str, dict[str, int]]


def granted(
    *, limit_bytes: int, used_bytes: int, nodes: Mapping[str, NodeAccount]
) -> dict[str, int]:
    """By node, how far it may go. `used_bytes` counts what `nodes` say that they have written."""
    if not nodes:
        return {}
    up_to = {node: _up_to(account) for node, account in nodes.items()}
    open_bytes = {node: up_to[node] - account.written_bytes for node, account in nodes.items()}
    left_bytes = max(0, limit_bytes - used_bytes - sum(open_bytes.values()))
    part_bytes = max(0, limit_bytes - used_bytes) // len(nodes)
    for node in sorted(nodes):
        more_bytes = min(left_bytes, max(0, part_bytes - open_bytes[node]))
        up_to[node] += more_bytes
        left_bytes -= more_bytes
    return up_to


def with_grants(
    accounts: Mapping[str, NodeAccount], up_to_bytes: Mapping[str, int]
) -> dict[str, NodeAccount]:
    """What a node says, and what it was granted since: it may have read of that, and used it."""
    return {
        name: NodeAccount(account.written_bytes, max(_up_to(account), up_to_bytes.get(name, 0)))
        if name in up_to_bytes
        else account
        for name, account in accounts.items()
    }


def _up_to(account: NodeAccount) -> int:
    """How far it may have gone by now."""
    return max(account.written_bytes, account.up_to_bytes or 0)
