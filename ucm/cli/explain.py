"""`ucm explain`: why a prompt hits or misses, block by block."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import (
    ASKING_VLLM,
    STATUS_WRONG,
    AsJson,
    StoreArgument,
    count,
    print_json,
    print_table,
    progress,
    say,
)
from ucm.errors import UcmError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm.store.blocks.keys import Key
    from ucm.store.inspect.engine_identity import EngineIdentity
    from ucm.store.inspect.explain import AskedPrompt, ExplainedBlock, Explanation
    from ucm.store.inspect.given import GivenStore


def explain(
    store: StoreArgument,
    model: Annotated[str, typer.Option("--model", help="as `vllm serve` is given it")],
    prompt_file: Annotated[
        str,
        typer.Option(
            "--prompt-file",
            help="the prompt's text; a .json file: its tokens, or the messages of a chat",
        ),
    ],
    salt: Annotated[
        str | None, typer.Option("--cache-salt", help="the request's cache_salt")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="the folder of the request's LoRA adapter")
    ] = None,
    other_salts: Annotated[
        list[str] | None, typer.Option("--try-salt", help="a salt that it may be stored with")
    ] = None,
    other_adapters: Annotated[
        list[str] | None,
        typer.Option("--try-adapter", help="an adapter that it may be stored with"),
    ] = None,
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- FLAGS]", help="the engine's flags, as in -- --kv-cache-dtype fp8"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say for each block of a prompt where it is, or why it is not there.

    Needs vLLM, for the tokens and for what an engine with these flags would store. Ends with 3 if a
    block is damaged or can't be read.
    """
    from ucm.store.inspect.engine_identity import EngineQuestion, ask_vllm
    from ucm.store.inspect.explain import explain as explained
    from ucm.store.inspect.given import given_store

    with one_line_for_errors("ucm explain"):
        given = given_store(store)
        _check_readable(prompt_file)
        question = EngineQuestion(
            model=model,
            vllm_args=vllm_args or [],
            config_file=store if given.settings is not None else "",
            prompt_file=prompt_file,
            adapters=[*([adapter] if adapter is not None else []), *(other_adapters or [])],
        )
        with progress(ASKING_VLLM):
            identity = ask_vllm(question)
        asked = _asked(identity, salt, other_salts or [], has_adapter=adapter is not None)
        with progress("reading") as on_progress:
            found = explained(
                given.backends,
                asked,
                given.page_key(),
                in_memory=_in_memory(given, identity, asked),
                on_progress=on_progress,
            )
    if as_json:
        print_json(found)
    else:
        _print(found)
    if any(block.state in ("corrupt", "unreadable") for block in _all_blocks(found)):
        raise typer.Exit(STATUS_WRONG)


def _check_readable(prompt_file: str) -> None:
    """Before vLLM is started for it. Raises UcmError."""
    try:
        open(prompt_file, "rb").close()
    except OSError as error:
        raise UcmError(f"{prompt_file}: can't be read: {error.strerror}") from error


def _asked(
    identity: EngineIdentity, salt: str | None, other_salts: list[str], *, has_adapter: bool
) -> AskedPrompt:
    """The first adapter is the request's, if it has one."""
    from ucm.store.blocks.namespace import from_json
    from ucm.store.inspect.explain import AskedPrompt

    digests = [bytes.fromhex(digest) for digest in identity.adapters]
    return AskedPrompt(
        manifest=from_json(identity.manifest_json.encode()),
        tokens=identity.tokens,
        salt=salt,
        adapter=digests[0] if has_adapter else None,
        other_salts=[None, *other_salts],
        other_adapters=[None, *digests],
    )


def _in_memory(given: GivenStore, identity: EngineIdentity, asked: AskedPrompt) -> frozenset[Key]:
    """What the node cache of a settings file has; none where it doesn't know the namespace."""
    from ucm.store.inspect.node_memory import keys_in_memory

    if given.settings is None:
        return frozenset()
    store, manifest = given.settings.store, asked.manifest
    return keys_in_memory(store, manifest, asked.keys(), page_bytes=identity.page_bytes)


def _print(found: Explanation) -> None:
    if not found.is_known:
        say(f"The store has nothing of this engine's namespace {found.namespace[:12]}.")
        for line in found.differences:
            say(f"  the nearest one differs in {line}")
    print_table(
        ("blocks", "tokens", "state", "why"),
        [_row(found, list(run)) for _, run in itertools.groupby(_all_blocks(found), _sort(found))],
    )
    tokens = found.blocks[found.num_loadable - 1].end_token if found.num_loadable else 0
    say(
        f"{found.num_loadable} of {count(len(found.blocks), 'block')} can be loaded, {tokens:,} of "
        f"{count(found.num_tokens, 'token')}{_of_tail(found)}."
    )


def _of_tail(found: Explanation) -> str:
    from ucm.store.inspect.explain import can_be_loaded

    tail, is_next = found.tail, found.num_loadable == len(found.blocks)
    if tail is None or not (is_next and can_be_loaded(tail)):
        return ""
    num_tokens = tail.end_token - tail.first_token
    return f", and the tail of {count(num_tokens, 'token')} after a hand-off"


def _all_blocks(found: Explanation) -> list[ExplainedBlock]:
    return found.blocks if found.tail is None else [*found.blocks, found.tail]


def _sort(found: Explanation) -> Callable[[ExplainedBlock], tuple[bool, str, str]]:
    return lambda block: (block is found.tail, block.state, block.why)


def _row(found: Explanation, run: Sequence[ExplainedBlock]) -> tuple[str, str, str, str]:
    """Of neighbouring blocks that have the same to be said of them."""
    first, last = run[0], run[-1]
    blocks = f"{first.block}" if first is last else f"{first.block}-{last.block}"
    tokens = f"{first.first_token}-{last.end_token - 1}"
    name = "tail" if first is found.tail else blocks
    return name, tokens, first.state.replace("_", " "), first.why
