"""The proxy's own errors, in the words of OpenAI's API."""

from __future__ import annotations

import msgspec
from aiohttp import web

_KINDS = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    502: "BadGatewayError",
    504: "GatewayTimeoutError",
    503: "ServiceUnavailableError",
}


def error_body(code: int, message: str) -> bytes:
    error = {"message": message, "type": _KINDS[code], "param": None, "code": code}
    return msgspec.json.encode({"error": error})


def error_response(code: int, message: str) -> web.Response:
    return web.Response(
        status=code, body=error_body(code, message), content_type="application/json"
    )
