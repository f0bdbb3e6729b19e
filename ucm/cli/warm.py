"""`ucm warm`: pages of prompts into this machine's memory before traffic comes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import (
    ASKING_VLLM,
    STATUS_WRONG,
    AsJson,
    EngineFlags,
    EngineNamespace,
    count,
    print_json,
    progress,
    say,
    size,
)
from ucm.cli.watched import SILENCE_S, TimeoutS, watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from ucm.config.settings import StoreSettings
    from ucm.store.inspect.asked_prompt import AskedPrompt
    from ucm.store.inspect.engine_identity import EngineIdentity
    from ucm.store.inspect.given_prompts import GivenPrompt
    from ucm.store.inspect.warm_pages import Warmed


_NAME: Final = "ucm warm"
SettingsFile = Annotated[
    str, typer.Argument(metavar="SETTINGS", help="the settings file of this machine's engines")
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="a .jsonl file, or - for standard input, with a prompt per line: a text, tokens, "
        "messages, or a request; or a file with one prompt",
    ),
]


def warm(
    settings_file: SettingsFile,
    model: Annotated[str, typer.Option("--model", help="as `vllm serve` is given it")],
    prompts: Prompts,
    salt: Annotated[
        str | None,
        typer.Option("--cache-salt", help="the requests' cache_salt, where they name none"),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="the folder of the requests' LoRA adapter")
    ] = None,
    namespace: EngineNamespace = "",
    hold_s: Annotated[
        float,
        typer.Option(
            "--hold",
            min=0,
            max=86_400,
            help="wait so many seconds for an engine, so that the node cache does not leave before",
        ),
    ] = 0.0,
    timeout_s: TimeoutS = SILENCE_S,
    vllm_args: EngineFlags = None,
    as_json: AsJson = False,
) -> None:
    """Bring the pages of prompts from storage into this machine's node cache.

    For a node that is new, or starts again: what is stored of these prompts is in memory when the
    first request comes. The node cache is started if there is none; it leaves when nobody has used
    it for node_cache_idle_exit_s, unless it runs as a service. Needs vLLM, for the tokens and the
    namespace.
    """
    from ucm.config.settings import load_settings_file
    from ucm.store.inspect.engine_identity import EngineQuestion, ask_vllm
    from ucm.store.inspect.given import check_no_url
    from ucm.store.inspect.given_prompts import read_prompts

    with one_line_for_errors(_NAME):
        check_no_url(settings_file)
        settings = load_settings_file(settings_file).store
        given = read_prompts(prompts)
        question = EngineQuestion(
            model=model,
            vllm_args=vllm_args or [],
            config_file=settings_file,
            prompts=given,
            adapters=[] if adapter is None else [adapter],
        )
        with progress(ASKING_VLLM):
            identity = ask_vllm(question)
    ask = partial(_asked, identity, given, settings.storage_backends, salt, namespace)
    act = partial(_warm, settings, identity, ask, timeout_s, hold_s, as_json=as_json)
    watched(_NAME, ", ".join(settings.storage_backends) or settings_file, timeout_s, act)


def _warm(
    settings: StoreSettings,
    identity: EngineIdentity,
    ask: Callable[[], list[AskedPrompt]],
    timeout_s: float,
    hold_s: float,
    *,
    as_json: bool,
) -> None:
    """Looks at storage, as does `ask`. Raises typer.Exit unless all is well."""
    from ucm.store.inspect.warm import warm as warm_up

    with one_line_for_errors(_NAME), progress("reading") as on_progress:
        asked = ask()
        warmed = warm_up(
            settings,
            asked,
            _page_bytes(identity, asked),
            timeout_s=timeout_s,
            hold_s=hold_s,
            on_progress=on_progress,
            on_warmed=partial(_print, as_json=as_json),
            on_lost=_say_lost,
        )
    if warmed.storage_hangs or warmed.failed:
        raise typer.Exit(1)
    if hold_s and not warmed.is_used:
        say(f"No engine has connected in {hold_s:g} s.", is_error=True)
        raise typer.Exit(STATUS_WRONG)


def _asked(
    identity: EngineIdentity,
    given: list[GivenPrompt],
    backends: tuple[str, ...],
    salt: str | None,
    namespace: str,
) -> list[AskedPrompt]:
    """Looks at the backends, so that no node cache makes one where none is mounted. Raises
    ConfigError, also if there is nothing to read of what is so short."""
    from ucm.errors import ConfigError
    from ucm.store.blocks.namespace import from_json
    from ucm.store.inspect.asked_prompt import AskedPrompt
    from ucm.store.inspect.given import check_backends
    from ucm.store.inspect.strands_in_store import with_strands_of_store

    check_backends(backends)
    manifest = from_json(identity.manifest_json.encode())
    manifest = with_strands_of_store(manifest, backends, namespace)
    if max(map(len, identity.tokens)) < manifest.block_tokens:
        raise ConfigError(
            f"no prompt is as long as a block, which has {manifest.block_tokens} tokens: nothing "
            f"is read of shorter ones"
        )
    return [
        AskedPrompt(
            manifest=manifest,
            tokens=tokens,
            salt=salt if prompt.salt is None else prompt.salt,
            adapter=bytes.fromhex(identity.adapters[0]) if identity.adapters else None,
        )
        for prompt, tokens in zip(given, identity.tokens, strict=True)
    ]


def _page_bytes(identity: EngineIdentity, asked: list[AskedPrompt]) -> list[int]:
    """Of each strand. Raises ConfigError where only a running engine could tell."""
    from ucm.errors import ConfigError
    from ucm.store.inspect.strand_pages import StrandPages

    sizes = StrandPages(asked[0].manifest).page_bytes or [identity.page_bytes]
    if not all(sizes):
        raise ConfigError(
            "the store has nothing of this model with these flags, so there is nothing to read: "
            "`ucm explain` tells what the nearest namespace differs in"
        )
    return sizes


def _print(warmed: Warmed, *, as_json: bool) -> None:
    if as_json:
        print_json(warmed)
    else:
        _say_counts(warmed)
    _say_problems(warmed)


def _say_counts(warmed: Warmed) -> None:
    say(
        f"{count(warmed.num_prompts, 'prompt')}: {count(warmed.read, 'page')} read, "
        f"{warmed.in_memory:,} in memory before, {warmed.missing:,} not in the store."
    )
    if warmed.no_room:
        say(
            f"For {count(warmed.no_room, 'page')} the node cache's memory had no room: it has "
            f"{size(warmed.memory_bytes)} (cache_buffer_capacity_gb)."
        )
    if warmed.damaged:
        say(
            f"{count(warmed.damaged, 'page')} can't be had: the first of a prompt is damaged, and "
            f"the others lie behind it; the node cache's log names it."
        )
    if warmed.warm_bytes > warmed.memory_bytes:
        say(
            f"These are {size(warmed.warm_bytes)}, and the node cache has "
            f"{size(warmed.memory_bytes)} of memory: those that were read first have gone again "
            f"(cache_buffer_capacity_gb)."
        )


def _say_lost(problem: str) -> None:
    say(f"{_NAME}: {problem}; once more from the beginning", is_error=True)


def _say_problems(warmed: Warmed) -> None:
    if warmed.missing and not warmed.read + warmed.in_memory:
        say(
            f"{_NAME}: nothing of these prompts is stored for this model with these flags: ucm "
            f"explain, with the same settings, model and flags, says what differs",
            is_error=True,
        )
    if warmed.failed:
        say(
            f"{_NAME}: storage failed: {count(warmed.failed, 'page')} could not be had; the node "
            f"cache's log says why, and ucm doctor tries storage out",
            is_error=True,
        )
    if warmed.storage_hangs:
        unasked = warmed.unasked_prompts
        more = f", and {count(unasked, 'prompt')} were given up" if unasked else ""
        say(
            f"{_NAME}: storage doesn't answer in time: {count(warmed.timed_out, 'page')} could not "
            f"be had{more}: look at the mount and its server; ucm doctor tries it out "
            f"(posix_io_timeout_ms, and --timeout-s for what is slow)",
            is_error=True,
        )
