"""What prefill, proxy and decode say to each other: vLLM's `kv_transfer_params`, under "ucm".

    proxy   -> prefill   Wanted      give a receipt, and store the tail as well
    prefill -> proxy     Receipt     what is, or is about to be, in the store
    proxy   -> decode    Receipt     as it came
                         Wanted      with_answer: give a receipt, there is nothing else to say
                         Expected    a prefill of this very prompt is under way
                         Withdrawn   it has failed; what is not there already will not come
    decode  -> proxy     Receipt     of the prompt with its answer

Each is a promise about time and nothing more: decode computes its keys itself, and what it loads is
verified as ever. Pure; no vLLM in here and no storage.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

NAME: Final = "ucm"

_Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Tokens = Annotated[int, Meta(ge=1, le=1 << 40)]


class Wanted(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="wanted"
):
    """To prefill. `with_answer` to decode: of the answer as well, and no tail is stored, which no
    next turn would find. An engine that doesn't know the field gives a receipt of the prompt."""

    with_answer: bool = False


class Receipt(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="receipt"):
    """The first `tokens` of the prompt are promised; `key` names the last of their blocks. Blocks
    are published in the order of the prompt, so its being there means that all are; only where
    another prompt goes on from it one may come a moment later. A promise that doesn't end at a
    block's border includes the tail. One that `is_whole` is for all of the prompt that can be.
    `issued_s` is in seconds since 1970, by the prefill machine's clock. `found_tokens` of the
    prompt were there before."""

    namespace: _Hex32
    block_tokens: _Tokens
    tokens: _Tokens
    key: _Hex32
    is_whole: bool = True
    issued_s: float
    found_tokens: Annotated[int, Meta(ge=0, le=1 << 40)] = 0


class Expected(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="expected"):
    """To decode: the whole prompt, its tail included."""


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="withdrawn"):
    """To decode: an `Expected` of the same prompt is void."""


Handoff = Wanted | Receipt | Expected | Withdrawn


def wants_prompt_alone(handoff: Handoff | None) -> bool:
    """Whether a receipt is asked for, of the prompt without its answer: what prefill is told."""
    return isinstance(handoff, Wanted) and not handoff.with_answer


def params(handoff: Handoff) -> dict[str, Any]:
    """The `kv_transfer_params` that say it."""
    return {NAME: msgspec.to_builtins(handoff)}


def parse(kv_transfer_params: object) -> Handoff | None:
    """What the `kv_transfer_params` of a request say; None if nothing, or nothing readable."""
    if not isinstance(kv_transfer_params, dict) or NAME not in kv_transfer_params:
        return None
    try:
        return msgspec.convert(kv_transfer_params[NAME], Handoff)  # type: ignore[no-any-return]
    except (msgspec.ValidationError, UnicodeEncodeError):  # the latter of lone surrogates
        return None
