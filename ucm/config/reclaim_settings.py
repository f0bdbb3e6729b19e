"""Settings of how large a store may grow and what goes when it is: names and meaning are UCM's.

They stand among the others in ucm_connector_config; docs/configuration.md explains each.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

# What a quota of a salt begins with: before the salt, and before the tag that stands for it.
QUOTA_OF_SALT = "salt:"
QUOTA_OF_TAG = "salt-tag:"
_TAG = re.compile("[0-9a-f]{16}")

_Share = Annotated[float, Meta(gt=0, le=1)]
_LEAST_TOUCH_S = 0.1
_Gigabytes = Annotated[float, Meta(ge=0, le=1 << 30)]


class ReclaimSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of the settings of a store."""

    # 0: no limit.
    capacity_gb: _Gigabytes = msgspec.field(default=0.0, name="posix_capacity_gb")
    # GiB by what names a namespace, see ucm/store/tiers/posix/quotas.py.
    quota_gb: dict[Annotated[str, Meta(min_length=1)], _Gigabytes] | None = None
    gc_enable: bool = msgspec.field(default=True, name="posix_gc_enable")
    gc_trigger_ratio: _Share = msgspec.field(default=0.7, name="posix_gc_trigger_threshold_ratio")
    gc_recycle_share: _Share = msgspec.field(default=0.1, name="posix_gc_recycle_percent")
    gc_grace_s: Annotated[float, Meta(ge=0, le=31_536_000)] = msgspec.field(
        default=120.0, name="posix_gc_grace_sec"
    )
    gc_check_interval_s: Annotated[float, Meta(ge=0.1, le=86_400)] = msgspec.field(
        default=30.0, name="posix_gc_check_interval_sec"
    )
    # 0: as the properties below say.
    gc_heartbeat_s: Annotated[float, Meta(ge=0, le=3_600)] = msgspec.field(
        default=0.0, name="posix_gc_heartbeat_interval_sec"
    )
    gc_stale_s: Annotated[float, Meta(ge=0, le=86_400)] = msgspec.field(
        default=0.0, name="posix_gc_stale_threshold_sec"
    )
    quarantine_hours: Annotated[int, Meta(ge=0, le=87_600)] = msgspec.field(
        default=168, name="posix_quarantine_hours"
    )

    def __post_init__(self) -> None:
        for name in self.quota_gb or ():
            tag = name.removeprefix(QUOTA_OF_TAG)
            if tag != name and not _TAG.fullmatch(tag):
                raise ValueError(
                    f"quota_gb: {name}: expected 16 hex digits behind {QUOTA_OF_TAG}, as `ucm du "
                    f"--salt` shows them; a salt itself is given as {QUOTA_OF_SALT}<salt>"
                )

    @property
    def quota_salts(self) -> list[str]:
        """The salts that have a quota by their own name."""
        names = self.quota_gb or ()
        return [
            name.removeprefix(QUOTA_OF_SALT) for name in names if name.startswith(QUOTA_OF_SALT)
        ]

    @property
    def heartbeat_s(self) -> float:
        return self.gc_heartbeat_s or max(1.0, self.gc_check_interval_s / 4)

    @property
    def stale_s(self) -> float:
        """Several beats, whatever is configured: a holder that is alive is never taken for dead."""
        wanted_s = self.gc_stale_s or max(60.0, 2 * self.gc_check_interval_s)
        return max(wanted_s, 3 * self.heartbeat_s)

    @property
    def touch_every_s(self) -> float | None:
        """How often a page that is used is touched, so that it is never older than the grace
        period while it is. None: nothing is reclaimed, so nobody looks at its age."""
        has_limit = bool(self.capacity_gb or any((self.quota_gb or {}).values()))
        return max(_LEAST_TOUCH_S, self.gc_grace_s / 2) if has_limit else None
