"""`ucm warm`: pages of prompts into this machine's memory before traffic comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from ucm.store.inspect.asked_prompt import AskedPrompt
    from ucm.store.inspect.engine_identity import EngineIdentity
    from ucm.store.inspect.given_prompts import GivenPrompt
    from ucm.store.inspect.warm import Warmed


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
    from ucm.store.inspect.warm import warm as warm_up

    with one_line_for_errors("ucm warm"):
        check_no_url(settings_file)
        settings = load_settings_file(settings_file).store
        given = read_prompts(prompts)
        question = EngineQuestion(
            model=model,
            vllm_args=vllm_args or [],
            config_file=settings_file,
            prompts=[each.value for each in given],
            adapters=[] if adapter is None else [adapter],
        )
        with progress(ASKING_VLLM):
            identity = ask_vllm(question)
        asked = _asked(identity, given, settings.storage_backends, salt, namespace)
        with progress("reading") as on_progress:
            warmed = warm_up(
                settings,
                asked,
                _page_bytes(identity, asked),
                hold_s=hold_s,
                on_progress=on_progress,
                on_warmed=print_json if as_json else _print,
            )
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
    from ucm.store.blocks.namespace import from_json
    from ucm.store.inspect.asked_prompt import AskedPrompt
    from ucm.store.inspect.strands_in_store import with_strands_of_store

    manifest = from_json(identity.manifest_json.encode())
    manifest = with_strands_of_store(manifest, backends, namespace)
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


def _print(warmed: Warmed) -> None:
    say(
        f"{count(warmed.num_prompts, 'prompt')}: {count(warmed.read, 'page')} read, "
        f"{warmed.in_memory:,} in memory before, {warmed.missing:,} not in the store."
    )
    if warmed.warm_bytes > warmed.memory_bytes:
        say(
            f"These are {size(warmed.warm_bytes)}, and the node cache has "
            f"{size(warmed.memory_bytes)} of memory: those that were read first have gone again "
            f"(cache_buffer_capacity_gb)."
        )
