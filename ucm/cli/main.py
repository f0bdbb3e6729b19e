"""The `ucm` command: each subcommand is one function, and imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ucm.errors import UcmError

app = typer.Typer(
    help="UCM: a KV cache for vLLM on storage that every node can mount.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _ucm() -> None:
    """Keeps the subcommands' names even while there are few of them."""


@app.command("node-cache")
def node_cache(
    config: Annotated[
        Path, typer.Option("--config", help="the settings file that the engines have, too")
    ],
) -> None:
    """Run this node's cache in the foreground, instead of letting the first engine start it."""
    from ucm.config.settings import load_settings_file
    from ucm.store.node.run import run_by_hand

    try:
        settings = load_settings_file(config)
        for warning in settings.warnings:
            typer.echo(f"warning: {warning}", err=True)
        run_by_hand(settings.store)
    except UcmError as error:
        typer.echo(f"ucm node-cache: {error}", err=True)
        raise typer.Exit(1) from None


@app.command("init")
def init(
    directory: Annotated[
        Path, typer.Argument(help="an entry of storage_backends, where this node mounts it")
    ],
    backend_id: Annotated[
        str, typer.Option("--id", help="the id it had, where a storage backend was emptied by hand")
    ] = "",
) -> None:
    """Make a directory a storage backend: give it its id, so that it is told from an empty mount
    point."""
    from ucm.store.tiers.posix.backend import Backend, parse_id

    path = str(directory.absolute())
    try:
        wanted_id = parse_id("--id", backend_id.encode()) if backend_id else None
        backend = Backend(path, direct_io=False)
        is_new = backend.open(wanted_id=wanted_id)
    except UcmError as error:
        typer.echo(f"ucm init: {error}", err=True)
        raise typer.Exit(1) from None
    found_id = backend.identity.id
    typer.echo(f"{path}: {'now' if is_new else 'already'} the storage backend {found_id:016x}")
    if wanted_id not in (None, found_id):
        typer.echo(f"ucm init: {path}: has another id than {backend_id}", err=True)
        raise typer.Exit(1)


@app.command(
    "proxy",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def proxy(context: typer.Context) -> None:
    """Run the proxy between prefill and decode; takes the flags of toy_proxy_server.py."""
    from ucm.pd import toy_proxy_server

    toy_proxy_server.main(context.args)


if __name__ == "__main__":
    sys.exit(app())
