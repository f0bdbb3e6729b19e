"""`ucm proxy`: the proxy between prefill and decode."""

from __future__ import annotations

import typer


def proxy(context: typer.Context) -> None:
    """Run the proxy between prefill and decode; takes the flags of toy_proxy_server.py."""
    from ucm.pd import toy_proxy_server

    toy_proxy_server.main(context.args)
