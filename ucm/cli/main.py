"""The `ucm` command. Each subcommand has a file of its own, which imports what it needs when it
runs: one that needs the proxy's packages doesn't keep the others from being used."""

from __future__ import annotations

import sys

import typer

from ucm.cli.init import init
from ucm.cli.node_cache import node_cache
from ucm.cli.proxy import proxy

app = typer.Typer(
    help="UCM: a KV cache for vLLM on storage that every node can mount.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("node-cache")(node_cache)
app.command("init")(init)
app.command(
    "proxy",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(proxy)

if __name__ == "__main__":
    sys.exit(app())
