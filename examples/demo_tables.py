"""What the demo prints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

BLOCK_TOKENS = 128
STORE_SETTLES_S = 1.0
STORE_SETTLE_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One prompt's answer. `promised_tokens` are those that others have stored."""

    name: str
    prompt_tokens: int
    promised_tokens: int
    loaded_tokens: int
    cold_ttft_s: float
    loaded_ttft_s: float
    is_same: bool

    @property
    def is_good(self) -> bool:
        return self.is_same and (self.loaded_tokens > 0 or self.promised_tokens == 0)


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        title="decode loads what prefill has computed",
        caption="TTFT: time to the first token. Same: the tokens of a plain vLLM, cold.",
    )
    table.add_column("prompt", no_wrap=True)
    for heading in ("tokens", "loaded", "TTFT cold", "from store"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same", no_wrap=True)
    for outcome in outcomes:
        has_blocks = outcome.promised_tokens > 0
        table.add_row(
            outcome.name,
            str(outcome.prompt_tokens),
            str(outcome.loaded_tokens) if has_blocks else "-",
            f"{outcome.cold_ttft_s * 1e3:.0f} ms",
            f"{outcome.loaded_ttft_s * 1e3:.0f} ms" if has_blocks else "-",
            "yes" if outcome.is_same else "[red]no[/red]",
        )
    return table


def store_table(store: Path) -> Table:
    """One row per namespace, once the last blocks have been written."""
    table = Table(box=SIMPLE_HEAD, title="what lies in the store", caption=str(store))
    table.add_column("namespace")
    table.add_column("files", justify="right")
    table.add_column("bytes", justify="right")
    for namespace, sizes in sorted(_settled_sizes(store).items()):
        table.add_row(f"{namespace[:16]}...", str(len(sizes)), f"{sum(sizes):,}")
    return table


def _settled_sizes(store: Path) -> dict[str, list[int]]:
    deadline = time.monotonic() + STORE_SETTLE_TIMEOUT_S
    found = _block_sizes(store)
    while time.monotonic() < deadline:
        time.sleep(STORE_SETTLES_S)
        earlier, found = found, _block_sizes(store)
        if found == earlier:
            break
    return found


def _block_sizes(store: Path) -> dict[str, list[int]]:
    """Sizes of the block files by namespace."""
    sizes: dict[str, list[int]] = {}
    for path in sorted(store.glob("*/??/??/*.kv")):
        sizes.setdefault(path.relative_to(store).parts[0], []).append(path.stat().st_size)
    return sizes
