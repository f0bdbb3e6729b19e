"""Which copy engine fits a device."""

from __future__ import annotations

from collections.abc import Sequence

from ucm.integration.copies.accelerator import Accelerator, BatchedCopy
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import STAGING_BYTES, CopyLimits, DeviceCopyEngine
from ucm.integration.copies.host import HostCopyEngine
from ucm.integration.copies.target import CopyTarget


def make_copy_engine(
    targets: Sequence[CopyTarget],
    *,
    accelerator: Accelerator | None = None,
    batched: BatchedCopy | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> CopyEngine:
    """The engine for the device that the targets are on: by `accelerator`, where that device is not
    like others. `batched` is the serving engine's own call for many copies at once, if it has
    one."""
    if targets[0].views[0].parts[0].device.type == "cpu":
        return HostCopyEngine(targets)
    limits = CopyLimits(staging_bytes=staging_bytes)
    return DeviceCopyEngine(targets, accelerator=accelerator, batched=batched, limits=limits)
