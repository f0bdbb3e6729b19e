"""A client's body, read within its limit, or the answer to one that can't be."""

from __future__ import annotations

from aiohttp import web

from ucm.pd.errors import error_response

# A prompt of several images may be large; something has to end one that never ends.
MAX_BODY_BYTES = 512 << 20


async def read(request: web.Request) -> bytes | web.Response:
    """The body, or the answer to one that is too large, or that can't be unpacked."""
    too_large = error_response(
        413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB", path=request.path
    )
    if (request.content_length or 0) > MAX_BODY_BYTES:
        # Before any of it is read; what the client sends of it nobody wants.
        too_large.force_close()
        return too_large
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        too_large.force_close()
        return too_large
    except web.RequestPayloadError as error:
        return error_response(400, f"the body can't be read: {error}", path=request.path)
