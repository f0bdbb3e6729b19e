"""Looks at an instance's /health, and what follows from them."""

from __future__ import annotations

import logging

import aiohttp

from ucm.pd.fleet.instance import Instance
from ucm.pd.legs import upstream

logger = logging.getLogger(__name__)


async def check_health(client: upstream.Client, instance: Instance, timeout_s: float) -> None:
    """A look that says nothing within `timeout_s` counts as a failed one. An instance that keeps
    failing them, and from which nothing has come for as long, is lost: a busy one may be late with
    its health, but not with everything."""
    before = instance.state
    is_well = await _is_well(client, instance, timeout_s)
    if is_well is None:
        return
    if is_well:
        instance.health.succeeded()
    else:
        instance.health.failed()
        patience_s = instance.health.max_failures * timeout_s
        if instance.health.state == "open" and instance.is_silent_for(patience_s):
            instance.lose("health checks fail, and nothing has come from it since")
    if (after := instance.state) != before:
        logger.warning("%s %s: %s -> %s", instance.role.value, instance.url, before, after)


async def _is_well(client: upstream.Client, instance: Instance, timeout_s: float) -> bool | None:
    """None when the proxy has nothing to look with."""
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        looking = client.pooled.get(
            instance.url / "health",
            timeout=timeout,
            headers=client.access.of_the_proxy(instance.role),
            ssl=client.tls.now,
        )
        async with looking as response:
            return response.ok
    except upstream.UNREACHABLE as error:
        return None if upstream.failure_reason(error) == upstream.OUT_OF_SOCKETS else False
