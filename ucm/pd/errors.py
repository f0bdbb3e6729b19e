"""The proxy's own errors as answers, in the words of the protocol that the client speaks."""

from __future__ import annotations

from aiohttp import web

from ucm.pd.protocol import protocol_of


def error_response(code: int, message: str, *, path: str = "") -> web.Response:
    """`path` is the request's; without one the error has OpenAI's form."""
    body = protocol_of(path).error_body(code, message)
    return web.Response(status=code, body=body, content_type="application/json")
