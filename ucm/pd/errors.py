"""The proxy's own errors as answers, in the words of the protocol that the client speaks."""

from __future__ import annotations

from aiohttp import web

from ucm.pd.protocol import protocol_of

# What the proxy turns away may be taken at any moment, by it or by another one. An instance that is
# busy comes after others for so long.
RETRY_AFTER_S = 1


def error_response(code: int, message: str, *, path: str = "") -> web.Response:
    """`path` is the request's; without one the error has OpenAI's form."""
    body = protocol_of(path).error_body(code, message)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if code == 503 else None
    return web.Response(status=code, body=body, content_type="application/json", headers=headers)
