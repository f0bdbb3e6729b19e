"""The `ucm` command. Each subcommand has a file of its own, which imports what it needs when it
runs: one that needs the proxy's packages doesn't keep the others from being used."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Final

import typer

from ucm.cli.bench import bench
from ucm.cli.doctor import doctor
from ucm.cli.du import du
from ucm.cli.explain import explain
from ucm.cli.init import init
from ucm.cli.inspect import inspect
from ucm.cli.ls import ls
from ucm.cli.node_cache import node_cache
from ucm.cli.printing import say
from ucm.cli.proxy import proxy
from ucm.cli.reclaim import reclaim
from ucm.cli.stat import stat
from ucm.cli.verify import verify
from ucm.cli.warm import warm

# Above its commands rather than above all: what `ucm --help` says is to fit a screen.
_ABOUT: Final = "UCM: a KV cache for vLLM on storage that every node can mount"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(is_asked_for: bool) -> None:
    if is_asked_for:
        from importlib.metadata import version

        say(f"ucm {version('ucm')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass  # all of it is done by subcommands


_command = partial(app.command, rich_help_panel=_ABOUT)
# In this order, and each in one line.
_command("node-cache", short_help="Run this node's cache in the foreground.")(node_cache)
_command("init", short_help="Make a directory a storage backend.")(init)
_command(
    "proxy",
    short_help="Run the proxy between prefill and decode.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(proxy)
_command("ls", short_help="What is in a store.")(ls)
_command("du", short_help="How much a store takes, by namespace and age.")(du)
_command("inspect", short_help="What one page is, and whether it is whole.")(inspect)
_command("verify", short_help="Check every byte of every page.")(verify)
_command("reclaim", short_help="Free room now, or tell what would go.")(reclaim)
_command("explain", short_help="Why a prompt hits or misses, block by block.")(explain)
_command("warm", short_help="Read the pages of prompts into memory.")(warm)
_command("stat", short_help="Watch this machine's node cache, like top.")(stat)
_command("bench", short_help="What a mount gives, in pages per second.")(bench)
_command("doctor", short_help="Is a mount fit for a store, and what to change.")(doctor)

if __name__ == "__main__":
    sys.exit(app())
