"""The endpoints that are about the proxy itself: its life, its metrics, its instances."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from ucm.pd import administration
from ucm.pd.access import Access
from ucm.pd.errors import error_response
from ucm.pd.fleet.instance import Role
from ucm.pd.fleet.pool import Pool, all_instances
from ucm.pd.legs.rewrite import parse_body
from ucm.pd.metrics import ProxyMetrics
from ucm.pd.stopping import Stopping

NEEDS_KEY = "needs the --admin-key of this proxy as a bearer token"


class About:
    """Owned by the event loop's thread."""

    def __init__(
        self,
        pools: Mapping[Role, Pool],
        metrics: ProxyMetrics,
        stopping: Stopping,
        access: Access,
    ) -> None:
        self._pools = pools
        self._metrics = metrics
        self._stopping = stopping
        self._access = access

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/health", self.health)
        router.add_get("/healthcheck", self.healthcheck)
        router.add_get("/ready", self.ready)
        router.add_get("/metrics", self.metrics_page)
        router.add_get("/instances", self.list_instances)
        router.add_post("/instances/{change:add|remove|drain}", self.change_instances)

    async def health(self, request: web.Request) -> web.Response:
        """The proxy lives, whatever its instances do."""
        return web.Response()

    async def healthcheck(self, request: web.Request) -> web.Response:
        if Role.WORKER in self._pools:
            counts = {"worker_instances": len(self._pools[Role.WORKER].instances)}
        else:
            counts = {
                "prefill_instances": len(self._pools[Role.PREFILL].instances),
                "decode_instances": len(self._pools[Role.DECODE].instances),
            }
        return web.json_response({"status": "ok", **counts})

    async def ready(self, request: web.Request) -> web.Response:
        """Whether a request would find somebody to answer it. Failed requests don't count: clients
        could make some, and what an instance answers is an answer."""
        if self._stopping.has_begun:
            return error_response(503, "the proxy is stopping")
        pool = self._pools.get(Role.DECODE) or self._pools[Role.WORKER]
        there = [each for each in pool.instances if not each.draining]
        if any(each.health.state != "open" for each in there):
            return web.json_response({"status": "ready"})
        return error_response(503, f"no {pool.role.value} instance is well")

    async def metrics_page(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain", charset="utf-8")

    async def list_instances(self, request: web.Request) -> web.Response:
        instances = all_instances(self._pools.values())
        return web.json_response({"instances": [each.described() for each in instances]})

    async def change_instances(self, request: web.Request) -> web.Response:
        if not self._access.is_admin(request.headers):
            return error_response(403, NEEDS_KEY)
        fields = parse_body(await request.read()) or {}
        refused = administration.change(self._pools, request.match_info["change"], fields)
        return refused or await self.list_instances(request)
