"""The proxy as an aiohttp application: which request goes which way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ucm.pd import administration, intake
from ucm.pd.about import NEEDS_KEY, About
from ucm.pd.access import Access
from ucm.pd.errors import error_response
from ucm.pd.flags import ProxySettings
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.members import Members
from ucm.pd.fleet.pool import Pool, all_instances
from ucm.pd.health import check_health
from ucm.pd.legs import bodies, upstream
from ucm.pd.legs.asking import Asker
from ucm.pd.legs.decode import Relay
from ucm.pd.legs.keepers import Keepers, named_by
from ucm.pd.legs.known import Known
from ucm.pd.legs.prefill import Leg, Prefills
from ucm.pd.legs.prefill_promise import PrefillPromise
from ucm.pd.legs.reading import ReadRequest, answers_at_once, is_invocation, passed_on, read_request
from ucm.pd.legs.resume import Tracker
from ucm.pd.legs.websocket import pass_through, wants_websocket
from ucm.pd.metrics import ProxyMetrics
from ucm.pd.protocol import CHAT, GENERATING, INVOCATIONS, RESUMABLE
from ucm.pd.security import tls
from ucm.pd.security.followed import start
from ucm.pd.stopping import Stopping, go_on
from ucm.pd.trace import RequestTrace

_NO_ACCESS = "this proxy wants one of its API keys, as a bearer token or as x-api-key"

STOPPING = web.AppKey("STOPPING", Stopping)


def make_app(settings: ProxySettings) -> web.Application:
    """For `ucm.pd.server.serve`."""
    proxy = Proxy(settings)
    app = web.Application(client_max_size=intake.MAX_BODY_BYTES, middlewares=[proxy.admitted])
    app[STOPPING] = proxy.stopping
    app.on_response_prepare.append(proxy.end_connection)
    app.cleanup_ctx.append(proxy.running)
    for path in GENERATING:
        app.router.add_post(path, proxy.generate)
    proxy.about.add_routes(app.router)
    # A dot would leave out paths with a line feed.
    app.router.add_route("*", r"/{path:[\s\S]*}", proxy.pass_on)
    return app


class Proxy:
    """All state of one proxy. Owned by the event loop's thread."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        roles = [Role.WORKER] if settings.is_mixed else [Role.PREFILL, Role.DECODE]
        self._pools = {role: Pool(role, settings.pool_rules) for role in roles}
        urls = {
            Role.PREFILL: settings.prefillers,
            Role.DECODE: settings.decoders,
            Role.WORKER: settings.workers,
        }
        for role, pool in self._pools.items():
            for url in urls[role]:
                pool.add(url)
        self.stopping = Stopping()
        self._access = Access(settings)
        self._known = Known(
            for_s=settings.known_for_s,
            max_new_tokens=settings.max_new_tokens,
            max_known=settings.max_known,
        )
        self._tls = tls.of_instances(settings)
        self._metrics = ProxyMetrics(self._pools.values)
        self.about = About(self._pools, self._metrics, self.stopping, self._access)
        self._prefills: Prefills | None = None
        self._relay: Relay | None = None
        self._client: upstream.Client | None = None

    async def running(self, app: web.Application) -> AsyncIterator[None]:
        """For the application's life: connections, and looks at the instances' health."""
        del app
        settings = self._settings
        async with upstream.client(
            connect_timeout_s=settings.connect_timeout_s, access=self._access, tls=self._tls
        ) as client:
            session, self._client = client.pooled, client
            asker = Asker(
                client,
                self._answering.role,
                idle_timeout_s=settings.idle_timeout_s,
                answer_timeout_s=settings.answer_timeout_s,
                max_answer_bytes=settings.max_answer_mb << 20,
            )
            self._relay = Relay(
                asker,
                self._answering,
                Keepers(settings.max_remembered),
                max_searched=settings.max_searched,
            )
            if Role.PREFILL in self._pools:
                self._prefills = Prefills(
                    client,
                    self._pools[Role.PREFILL],
                    timeout_s=settings.prefill_timeout_s,
                    max_answer_bytes=settings.max_answer_mb << 20,
                    on_retry=self._metrics.retries.labels(Role.PREFILL.value).inc,
                )
            followed = Members(self._pools).sources(
                session, instances_file=settings.instances_file, etcd=settings.etcd
            )
            followed += [*self._access.following(), *self._tls.following()]
            background = start([self._check_health(client), *followed])
            yield
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    @property
    def admitted(self) -> Middleware:
        """Before anything else: whether the client may ask at all."""
        return web.middleware(partial(self._admit))

    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._access.may_ask(request.method, request.path, request.headers):
            return await handler(request)
        self._metrics.failed.labels("unauthorized").inc()
        response = error_response(401, _NO_ACCESS, path=request.path)
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    # -- requests --------------------------------------------------------------------------

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await intake.read(request)
        if isinstance(body, web.Response):
            return body
        read = partial(
            read_request,
            body,
            request.path,
            min_tokens=self._settings.min_prefill_tokens,
            has_prefill=self._prefills is not None,
            chains=self._known.is_on,
            places_from=self._settings.places_from,
        )
        wanted = await bodies.apart(read, num_bytes=len(body))
        if request.path == INVOCATIONS and not is_invocation(wanted):
            return await self._pass_on(request, body)
        if wanted is None:
            return error_response(400, "the body is not a JSON object", path=request.path)
        return await self._traced(request, partial(self._generate, request, wanted))

    async def _generate(
        self, request: web.Request, wanted: ReadRequest, trace: RequestTrace
    ) -> web.StreamResponse:
        fields = wanted.fields
        trace.tokens, trace.kind, trace.prefix = wanted.tokens, wanted.kind, wanted.prefix
        trace.is_streamed = bool(fields.get("stream"))
        trace.reads_answer = bool(wanted.chain)
        tracker = None
        if self._settings.resume and request.path in RESUMABLE and fields.get("stream"):
            tracker = Tracker(fields, is_chat=request.path == CHAT)
        name = named_by(request.method, request.path, request.headers, fields)
        if name is not None and wanted.why_not is None:
            # No prefill instance has it.
            wanted = replace(wanted, why_not="continued")
        if wanted.why_not is None and self._known.has_nearly_all(wanted.chain, wanted.marks):
            wanted = await bodies.apart(wanted.known, num_bytes=len(wanted.body))
        with self._promised(request, wanted, trace) as promise:
            waits = self._settings.handoff == "chain" or answers_at_once(request.path, fields)
            if promise is not None and (waits or not promise.is_told):
                await promise.settled()
            found = await self._relaying.answer(request, wanted.body, trace, tracker, promise, name)
        self._known.answered(wanted.marks, trace.stored_tokens, trace.answer_ids)
        if wanted.why_not == "known" and trace.status == web.HTTPOk.status_code:
            self._known.went_on(wanted.chain, answer_tokens=trace.answer_tokens)
        return found

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Everything else is for an instance that answers, but for what is about all of them."""
        assert self._client is not None, "requests come after the start"
        if administration.is_for_all(request.raw_path):
            return await self._administer(request, self._client)
        if wants_websocket(request):
            joined = partial(
                pass_through,
                self._client,
                self._answering,
                request,
                idle_timeout_s=self._settings.websocket_idle_timeout_s,
            )
            return await self._traced(request, joined)
        body = await intake.read(request) if request.can_read_body else None
        if isinstance(body, web.Response):
            return body
        return await self._pass_on(request, body)

    async def _pass_on(self, request: web.Request, body: bytes | None) -> web.StreamResponse:
        if body:
            body = await bodies.apart(partial(passed_on, body), num_bytes=len(body))

        name = named_by(request.method, request.path, request.headers, {})

        async def go(trace: RequestTrace) -> web.StreamResponse:
            # A response that is made in the background can be read as it comes.
            trace.is_streamed = request.query.get("stream", "").lower() in ("true", "1")
            if request.method == "POST" and self._prefills is not None:
                trace.not_prefilled("route")
            return await self._relaying.answer(request, body, trace, name=name)

        return await self._traced(request, go)

    async def _administer(
        self, request: web.Request, client: upstream.Client
    ) -> web.StreamResponse:
        is_for_anybody = administration.is_for_anybody(request.raw_path)
        if not is_for_anybody and not self._access.is_admin(request.headers):
            return error_response(403, f"{request.path} {NEEDS_KEY}, and goes to all instances")
        body = await intake.read(request)
        if isinstance(body, web.Response):
            return body
        go = partial(administration.broadcast, client, self._instances(), request, body)
        return await self._traced(request, partial(go, self._settings.idle_timeout_s))

    async def _traced(
        self, request: web.Request, go: Callable[[RequestTrace], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        trace = RequestTrace(
            self._metrics,
            route=f"{request.method} {request.path}",
            request_id=request.headers.get(upstream.REQUEST_ID),
        )
        if self._prefills is None:
            trace.path = "mixed"
        try:
            with self.stopping.running(trace):
                return await go(trace)
        except asyncio.CancelledError:
            if go_on(trace):
                return _turned_away(trace, request.path)
            trace.client_left()
            raise
        finally:
            trace.end()

    async def end_connection(self, request: web.Request, response: web.StreamResponse) -> None:
        """While the proxy stops, a connection that was kept gets no further request."""
        del request
        if self.stopping.has_begun:
            response.force_close()
            response.headers["Connection"] = "close"

    @contextmanager
    def _promised(
        self, request: web.Request, wanted: ReadRequest, trace: RequestTrace
    ) -> Iterator[PrefillPromise | None]:
        """The request's prefill, until the request is over; None where it would be of no use."""
        if self._prefills is None:
            yield None
            return
        if wanted.why_not is not None:
            trace.not_prefilled(wanted.why_not)
            yield None
            return
        assert self._client is not None, "requests come after the start"
        request_id = f"{trace.request_id}-p"
        headers = self._client.headers(request.headers, Role.PREFILL, request_id=request_id)
        # The proxy reads this answer, and unpacks nothing.
        headers["Accept-Encoding"] = "identity"
        leg = Leg(
            path=request.raw_path,
            headers=headers,
            body=wanted.first,
            tokens=trace.tokens,
            kind=trace.kind,
            prefix=trace.prefix,
        )
        promise = PrefillPromise(
            self._prefills.join(leg),
            trace,
            is_told=wanted.is_all,
            wants_receipt=wanted.wants_receipt,
            linger_s=self._settings.usage_wait_s,
        )
        try:
            yield promise
        finally:
            promise.leave()
            self._known.note(wanted.chain, promise.outcome, answer_tokens=trace.answer_tokens)

    @property
    def _relaying(self) -> Relay:
        assert self._relay is not None, "requests come after the start"
        return self._relay

    @property
    def _answering(self) -> Pool:
        return self._pools.get(Role.DECODE) or self._pools[Role.WORKER]

    def _instances(self) -> list[Instance]:
        return all_instances(self._pools.values())

    # -- health ----------------------------------------------------------------------------

    async def _check_health(self, client: upstream.Client) -> None:
        interval_s = self._settings.health_interval_s
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.gather(
                *(check_health(client, each, interval_s) for each in self._instances())
            )
            for pool in self._pools.values():
                pool.dispatch()


def _turned_away(trace: RequestTrace, path: str) -> web.Response:
    """For one that the end of the proxy has interrupted before its answer began."""
    trace.status = 503
    trace.failed("stopping")
    response = error_response(503, "the proxy is stopping", path=path)
    response.headers.update(trace.headers())
    return response
