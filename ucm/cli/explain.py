"""`ucm explain`: why a prompt hits or misses, block by block."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import (
    ASKING_VLLM,
    STATUS_WRONG,
    AsJson,
    EngineFlags,
    EngineNamespace,
    StoreArgument,
    count,
    print_json,
    print_table,
    progress,
    say,
)

if TYPE_CHECKING:
    from ucm.store.blocks.keys import Key
    from ucm.store.inspect.asked_prompt import AskedPrompt
    from ucm.store.inspect.engine_identity import EngineIdentity
    from ucm.store.inspect.explain import ExplainedBlock, Explanation
    from ucm.store.inspect.given import GivenStore


_BAD = ("corrupt", "unreadable")


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
    namespace: EngineNamespace = "",
    vllm_args: EngineFlags = None,
    as_json: AsJson = False,
) -> None:
    """Say for each block of a prompt where it is, or why it is not there.

    Needs vLLM, for the tokens and for what an engine with these flags would store. Ends with 3 if a
    block is damaged or can't be read.
    """
    from ucm.store.inspect.engine_identity import EngineQuestion, ask_vllm
    from ucm.store.inspect.given import given_store
    from ucm.store.inspect.given_prompts import read_prompts
    from ucm.store.inspect.strands_in_store import with_strands_of_store

    with one_line_for_errors("ucm explain"):
        given = given_store(store)
        prompt = read_prompts(prompt_file)[0]
        question = EngineQuestion(
            model=model,
            vllm_args=vllm_args or [],
            config_file=store if given.settings is not None else "",
            prompts=[prompt],
            adapters=[each for each in (adapter, *(other_adapters or [])) if each is not None],
        )
        with progress(ASKING_VLLM):
            identity = ask_vllm(question)
        salt = prompt.salt if salt is None else salt
        asked = _asked(identity, salt, other_salts or [], has_adapter=adapter is not None)
        made = with_strands_of_store(asked.manifest, given.backends, namespace)
        found = _explained(given, identity, replace(asked, manifest=made))
    (print_json if as_json else _print)(found)
    if any(block.state in _BAD for block in _all_blocks(found)):
        raise typer.Exit(STATUS_WRONG)


def _asked(
    identity: EngineIdentity, salt: str | None, other_salts: list[str], *, has_adapter: bool
) -> AskedPrompt:
    """The first adapter is the request's, if it has one."""
    from ucm.store.blocks.namespace import from_json
    from ucm.store.inspect.asked_prompt import AskedPrompt

    digests = [bytes.fromhex(digest) for digest in identity.adapters]
    return AskedPrompt(
        manifest=from_json(identity.manifest_json.encode()),
        tokens=identity.tokens[0],
        salt=salt,
        adapter=digests[0] if has_adapter else None,
        other_salts=[None, *other_salts],
        other_adapters=[None, *digests],
        window_interval=identity.window_interval,
        state_interval_tokens=identity.state_interval_tokens,
    )


def _explained(given: GivenStore, identity: EngineIdentity, asked: AskedPrompt) -> Explanation:
    from ucm.store.inspect.explain import explain as explained

    with progress("reading") as on_progress:
        return explained(
            given.backends,
            asked,
            given.page_key(),
            in_memory=_in_memory(given, identity, asked),
            on_progress=on_progress,
        )


def _in_memory(given: GivenStore, identity: EngineIdentity, asked: AskedPrompt) -> frozenset[Key]:
    """What the node cache of a settings file has; none where it doesn't know the namespace."""
    from ucm.store.inspect.node_memory import keys_in_memory
    from ucm.store.inspect.strand_pages import StrandPages

    if given.settings is None:
        return frozenset()
    store, manifest = given.settings.store, asked.manifest
    sizes = StrandPages(manifest).page_bytes or [identity.page_bytes]
    return frozenset().union(
        *(
            keys_in_memory(store, manifest, keys, page_bytes=page_bytes)
            for keys, page_bytes in zip(asked.keys_by_strand(), sizes, strict=True)
            if page_bytes
        )
    )


def _print(found: Explanation) -> None:
    if not found.is_known:
        name = f"'s namespace {found.namespace[:12]}" if found.namespace else ""
        say(f"The store has nothing of this engine{name}.")
        for line in found.differences:
            say(f"  the nearest one differs in {line}")
    blocks = _all_blocks(found)
    rows = [_row(run, is_tail=run[0] is found.tail) for run in _runs(blocks, found.tail)]
    columns = ("strand", "blocks", "tokens", "state", "why")
    if any(block.strand for block in blocks):
        say(f"{found.model}, namespace {found.namespace[:12]} of the store:")
        print_table(columns, rows)
    else:
        print_table(columns[1:], [row[1:] for row in rows])
    say(
        f"{found.num_loadable} of {count(len(found.blocks), 'block')} can be loaded, "
        f"{found.num_loadable_tokens:,} of {count(found.num_tokens, 'token')}{_of_tail(found)}"
        f"{_in_the_way(found)}."
    )


def _of_tail(found: Explanation) -> str:
    from ucm.store.inspect.explain import can_be_loaded

    if found.ends:
        is_more = found.num_handed_over > found.num_loadable_tokens
        return f", and {found.num_handed_over:,} after a hand-off" if is_more else ""
    tail, is_next = found.tail, found.num_loadable == len(found.blocks)
    if tail is None or not (is_next and can_be_loaded(tail)):
        return ""
    num_tokens = tail.end_token - tail.first_token
    return f", and the tail of {count(num_tokens, 'token')} after a hand-off"


def _all_blocks(found: Explanation) -> list[ExplainedBlock]:
    return [*found.blocks, *([found.tail] if found.tail is not None else ()), *found.sides]


def _in_the_way(found: Explanation) -> str:
    """Of a longer hit."""
    from ucm.store.inspect.explain import can_be_loaded, is_broken

    longest = found.ends[0] if found.ends else None
    if longest is None or not longest.strand:
        return ""
    lost = next((each for each in found.blocks if not can_be_loaded(each)), None)
    if lost is not None and is_broken(lost):
        return f"; block {lost.block} of {lost.strand} is {lost.state}"
    return f"; at {longest.end_tokens:,} {longest.strand} lacks block {longest.block}"


def _runs(blocks: list[ExplainedBlock], tail: ExplainedBlock | None) -> list[list[ExplainedBlock]]:
    """Neighbouring blocks that have the same to be said of them."""
    runs: list[list[ExplainedBlock]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        if last is not None and last is not tail and block is not tail and _is_next(last, block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _is_next(before: ExplainedBlock, block: ExplainedBlock) -> bool:
    is_neighbour = (block.strand, block.block) == (before.strand, before.block + 1)
    return is_neighbour and (block.state, block.why) == (before.state, before.why)


def _row(run: list[ExplainedBlock], *, is_tail: bool) -> tuple[str, ...]:
    first, last = run[0], run[-1]
    blocks = f"{first.block}" if first is last else f"{first.block}-{last.block}"
    tokens = f"{first.first_token}-{last.end_token - 1}"
    name = "tail" if is_tail else blocks
    return first.strand, name, tokens, first.state.replace("_", " "), first.why
