"""The proxy's own errors, in the words of OpenAI's API."""

from __future__ import annotations

import msgspec
from aiohttp import web

_INTERNAL = "InternalServerError"
_BAD = "BadRequestError"
_KINDS = {
    400: _BAD,
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    502: "BadGatewayError",
    504: "GatewayTimeoutError",
    503: "ServiceUnavailableError",
}


def error_body(code: int, message: str) -> bytes:
    kind = _KINDS.get(code, _BAD if code < 500 else _INTERNAL)
    error = {"message": message, "type": kind, "param": None, "code": code}
    return msgspec.json.encode({"error": error})


def error_response(code: int, message: str) -> web.Response:
    return web.Response(
        status=code, body=error_body(code, message), content_type="application/json"
    )
