"""How much each node may write of what a limit leaves. Pure.

Every node cache says, with each beat and in a file of its own, how much it has written since it
began and how far it may go. Who holds the lease adds that to what it has counted, and grants more
of what is left of the limit. So for each account

    counted + written since + granted and not written  <=  limit

No node is granted more at once than its part of what lies between the mark where reclaim begins and
the limit: those that write nothing would keep it from the others. A node with more than that, since
others have come, is granted less; it counts as having all that it had until it says that it has
less, for it may write that this very moment.

A node that falls silent may have written all that it was granted: others get nothing of that until
the store is counted anew. It stops by itself when its beats don't get through.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec


class NodeAccount(msgspec.Struct, frozen=True, array_like=True):
    """Of one account at one node. `up_to_bytes`: None before anything was granted.
    `in_flight_bytes`: of what it has written, what may not be in storage yet."""

    written_bytes: int
    up_to_bytes: int | None
    in_flight_bytes: int = 0


class NodeNote(msgspec.Struct, frozen=True):
    """What a node says. `beat` grows while it lives. `refused`: the accounts that its writers were
    refused for since the beat before."""

    beat: int
    accounts: dict[str, NodeAccount]
    refused: list[str] = []


class GrantsNote(msgspec.Struct, frozen=True):
    """What the holder of the lease says: by node, by account, how far it may go; and what is used
    of each account, and of the whole what is no page, for people. `number` grows with each: a
    client of a shared filesystem may read an old one again."""

    number: int
    used_bytes: dict[str, int]
    up_to_bytes: dict[str, dict[str, int]]
    other_bytes: int = 0


def granted(
    *,
    limit_bytes: int,
    used_bytes: int,
    nodes: Mapping[str, NodeAccount],
    spare_share: float,
    refused: Collection[str] = (),
) -> dict[str, int]:
    """By node, how far it may go. `used_bytes` counts what `nodes` say that they have written. All
    together have no more than `spare_share` of the limit open. But those that were `refused` get an
    equal part of all that is left: their pages may be larger than that."""
    if not nodes:
        return {}
    up_to = {node: _up_to(account) for node, account in nodes.items()}
    open_bytes = {node: up_to[node] - account.written_bytes for node, account in nodes.items()}
    free_bytes = max(0, limit_bytes - used_bytes)
    left_bytes = max(0, free_bytes - sum(open_bytes.values()))
    part_bytes = free_bytes // len(nodes)
    most_bytes = min(part_bytes, int(limit_bytes * spare_share) // len(nodes))
    for node in sorted(nodes):
        wanted_bytes = part_bytes if node in refused else most_bytes
        more_bytes = min(left_bytes, wanted_bytes - open_bytes[node])
        up_to[node] += more_bytes
        left_bytes -= max(0, more_bytes)
    return up_to


def with_grants(
    accounts: Mapping[str, NodeAccount], up_to_bytes: Mapping[str, int]
) -> dict[str, NodeAccount]:
    """What a node says, and what it was granted since: it may have read of that, and used it."""
    return {
        name: msgspec.structs.replace(
            account, up_to_bytes=max(_up_to(account), up_to_bytes.get(name, 0))
        )
        if name in up_to_bytes
        else account
        for name, account in accounts.items()
    }


def _up_to(account: NodeAccount) -> int:
    """How far it may have gone by now."""
    return max(account.written_bytes, account.up_to_bytes or 0)
