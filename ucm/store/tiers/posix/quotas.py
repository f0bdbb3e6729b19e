"""How large a backend, and each namespace and salt on it, may become. Pure.

`posix_capacity_gb` is for the whole store, over all its backends; a `quota_gb` is for one
namespace or one salt, over all backends. Both are split evenly, as pages are. A quota names its
namespaces by

* the beginning of the fingerprint, 8 hex digits at least: the directory's name;
* or what `weights` says in the manifest, such as `model_id:llama`;
* or `*`, for each of those that nothing else names.

A namespace that several name has the first of these, in this order.

A salt is named as `salt:<the salt>`, or by its tag as `salt-tag:<16 hex digits>`, as `ucm du
--salt` tells them, for those who keep their salts to themselves. It is one account over all
namespaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ucm.config.reclaim_settings import QUOTA_OF_SALT, QUOTA_OF_TAG
from ucm.store.blocks.keys import salt_tag

_EACH = "*"
_GIB = 1 << 30
_BEGINNING = re.compile(r"[0-9a-f]{8,64}(-[0-9a-f]{0,16})?")


@dataclass(frozen=True)
class Limit:
    """`setting` is what people have to change."""

    nbytes: int
    setting: str


@dataclass(frozen=True)
class Quotas:
    """Of one backend. Falsy: there is no limit."""

    whole: Limit | None = None
    by_name: Mapping[str, Limit] = field(default_factory=dict)
    # By account.
    by_salt: Mapping[str, Limit] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.whole is not None or bool(self.by_name) or bool(self.by_salt)

    def of(self, namespace: str, manifest: bytes) -> Limit | None:
        """Of a namespace, by its directory's name and its manifest; None for none."""
        for name, limit in self.by_name.items():
            if _BEGINNING.fullmatch(name) and namespace.startswith(name):
                return limit
        return self.by_name.get(_weights_in(manifest)) or self.by_name.get(_EACH)


def quotas_of(capacity_gb: float, quota_gb: Mapping[str, float], *, num_backends: int) -> Quotas:
    """Of each of `num_backends`. A capacity of 0 is none, and so is a quota of 0."""
    whole = Limit(_part(capacity_gb, num_backends), "posix_capacity_gb") if capacity_gb else None
    limits = {
        name: Limit(_part(gb, num_backends), f"quota_gb of {name}")
        for name, gb in quota_gb.items()
        if gb
    }
    by_name, by_salt = {}, {}
    for name, limit in limits.items():
        account = _salt_account_named(name)
        if account is None:
            by_name[name] = limit
        else:
            by_salt[account] = limit
    return Quotas(whole, by_name, by_salt)


def salt_account(tag: bytes) -> str:
    """The account of the pages whose keys end with `tag`: no namespace has such a name."""
    return QUOTA_OF_TAG + tag.hex()


def _salt_account_named(name: str) -> str | None:
    """None: it is no salt."""
    if name.startswith(QUOTA_OF_SALT):
        return salt_account(salt_tag(name.removeprefix(QUOTA_OF_SALT)))
    return name if name.startswith(QUOTA_OF_TAG) else None


def _weights_in(manifest: bytes) -> str:
    try:
        found = json.loads(manifest)
    except ValueError:
        return ""
    weights = found.get("weights") if isinstance(found, dict) else None
    return weights if isinstance(weights, str) else ""


def _part(gb: float, num_backends: int) -> int:
    return max(1, int(gb * _GIB) // num_backends)
