"""`ucm node-cache`: this node's cache in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import say


def node_cache(
    config: Annotated[
        Path, typer.Option("--config", help="the settings file that the engines have, too")
    ],
) -> None:
    """Run this node's cache in the foreground, instead of letting the first engine start it."""
    from ucm.config.settings import load_settings_file
    from ucm.store.node.run import run_by_hand

    with one_line_for_errors("ucm node-cache"):
        settings = load_settings_file(config)
        for warning in settings.warnings:
            say(f"warning: {warning}", is_error=True)
        run_by_hand(settings.store)
