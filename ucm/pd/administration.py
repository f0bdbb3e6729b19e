"""What changes an engine, or shows its inside, is for who has the admin key, and for all engines.

An adapter that one decode instance has and the next has not, or a cache that is reset at one of
four, is a fault that shows at random. So such a request goes to every instance, of both roles, and
the answer says what each of them said. Without the key it goes to none: a proxy that passes
everything on would let any client put an engine to sleep.

A client may end requests by their ids, which it has to know. Where they run it does not: that goes
to all as well, for anybody whom the engines let.
"""

from __future__ import annotations

import asyncio
import json
import logging
import string
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from yarl import URL

from ucm.errors import ConfigError
from ucm.pd.errors import error_response
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.pool import Pool
from ucm.pd.fleet.silence import unless_lost
from ucm.pd.fleet.urls import instance_url
from ucm.pd.legs import upstream
from ucm.pd.trace import RequestTrace

logger = logging.getLogger(__name__)

# vLLM's, those of its development mode and of reinforcement learning included.
PATHS = frozenset(
    {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/release_kv_cache_memory",
        "/pause",
        "/resume",
        "/is_paused",
        "/abort_requests",
        "/start_profile",
        "/stop_profile",
        "/collective_rpc",
        "/server_info",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_info",
        "/weight_checker",
        "/get_world_size",
    }
)
# For all instances, and no admin's.
FOR_ANYBODY = frozenset({"/inference/v1/abort_requests"})
_SHOWN_BYTES = 64 << 10


def is_for_all(raw_path: str) -> bool:
    """Of a request's path as it came."""
    return _path(raw_path) in PATHS | FOR_ANYBODY


def is_for_anybody(raw_path: str) -> bool:
    return _path(raw_path) in FOR_ANYBODY


def _path(raw_path: str) -> str:
    """Engines undo its escapes once, and so does this; what some routers ignore at its end goes."""
    path = upstream.target(URL("http://engine"), raw_path).raw_path
    return unquote(path).rstrip("/" + string.whitespace)


def change(
    pools: Mapping[Role, Pool], change: str, fields: Mapping[str, Any]
) -> web.Response | None:
    """Adds, drains or removes an instance; an answer if it can't."""
    try:
        pool = pools[Role(str(fields.get("role")))]
        url = instance_url(str(fields.get("url")))
    except (ValueError, KeyError):
        roles = " or ".join(role.value for role in pools)
        return error_response(400, f"role: expected {roles}")
    except ConfigError as error:
        return error_response(400, f"url: {error}")
    changed = getattr(pool, change)(url)
    if not changed and change != "add":
        return error_response(404, f"{url} is no {pool.role.value} instance here")
    logger.info("%s %s %s", change, pool.role.value, url)
    return None


async def broadcast(
    client: upstream.Client,
    instances: Sequence[Instance],
    request: web.Request,
    body: bytes,
    timeout_s: float,
    trace: RequestTrace,
) -> web.Response:
    """Asks all of them at once, and waits for none for longer than that, nor for one that is lost.
    The status is 200 if each has done it, otherwise the first one that is none of success."""
    trace.path = "all-instances"
    said = await asyncio.gather(
        *(_ask(client, each, request, body, timeout_s, trace.request_id) for each in instances)
    )
    bad = [each["status"] for each in said if not 200 <= each["status"] < 300]
    status = trace.status = bad[0] if bad else 200
    what = f"{request.method} {request.path}"
    logger.info("%s at %d instances: %d of them refused or failed", what, len(said), len(bad))
    if is_for_anybody(request.raw_path):
        # Who the instances are is for the admin.
        problem = f"{len(bad)} of {len(said)} instances refused or failed"
        response = error_response(status, problem) if bad else web.Response()
    else:
        response = web.json_response({"instances": said}, status=status)
    response.headers.update(trace.headers())
    return response


async def _ask(
    client: upstream.Client,
    instance: Instance,
    request: web.Request,
    body: bytes,
    timeout_s: float,
    request_id: str,
) -> dict[str, Any]:
    where = {"role": instance.role.value, "url": str(instance.url)}
    headers = client.headers(request.headers, instance.role, request_id=request_id)
    headers["Accept-Encoding"] = "identity"

    async def asking() -> tuple[int, bytes]:
        response = await upstream.ask(
            client,
            request.method,
            upstream.target(instance.url, request.raw_path),
            body=body,
            headers=headers,
            idle_timeout_s=None,
        )
        async with response:
            return response.status, await upstream.read_at_most(response, _SHOWN_BYTES)

    try:
        status, answer = await unless_lost(instance, asyncio.wait_for(asking(), timeout_s))
    except upstream.UNREACHABLE as error:
        reason = upstream.failure_reason(error)
        status, what = upstream.status_for(reason), str(error)
        if reason == "timeout":
            what = f"no answer within --idle-timeout-s, {timeout_s:g} s"
        return {**where, "status": status, "answer": f"{reason} ({what})"}
    return {**where, "status": status, "answer": _readable(answer)}


def _readable(answer: bytes) -> object:
    try:
        return json.loads(answer)
    except ValueError:
        return answer.decode(errors="replace")
