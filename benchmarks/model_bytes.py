"""What a prompt's KV takes in a store, of public models: arithmetic, nothing is measured.

    python benchmarks/model_bytes.py [--tensor-parallel-size 1] [--prompts 4096 32768]

prints the tables of docs/models.md ("What is written"): the bytes that UCM and the fs tier of
vLLM's OffloadingConnector write of a prompt, and read when it comes back as it was. UCM's come from
its own functions; it writes pages, whose files have 4 KiB more each. Prompts only, whole blocks
only (a tail is written where a prompt is handed over), bfloat16.

What vLLM 0.32 does:

- v1/core/kv_cache_utils.py, _get_kv_cache_groups_uniform_page_size: layers of one kind are cut into
  groups of one size, the last of them with slots that nothing uses. A block of any group takes as
  many bytes: a row.
- distributed/kv_transfer/kv_connector/v1/offloading/config.py and v1/kv_offload/cpu/spec.py: a file
  is a whole row of all ranks, those that nothing uses and copies of heads included; only MLA on one
  node is there once. tiering/fs/manager.py writes rows and nothing else.
- offloading/scheduler.py, _build_store_jobs, and v1/core/single_type_kv_cache_manager.py,
  reachable_block_mask: of full attention every block; of windows the blocks that end at multiples
  of `--prefix-cache-retention-interval` (0 by default: none) and at the last block before the
  prompt's last token; of states those at the same places.
- offloading/scheduler.py, _lookup_complete_chunks: with windows or states a hit ends before the
  last token. What is found is read, before it is known what of it is needed (tiering/manager.py,
  lookup).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.public_models import MODELS, Model, blocks_of
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.blocks.strands import ALL, STATE, Reach, kept_blocks, last_boundary, needed_blocks

PROMPTS: Final = (4096, 32768)
# Where vLLM pads the smaller kinds of layers instead of cutting the larger ones.
_MOSTLY_ONE_SIZE: Final = 1.5


# -- UCM ---------------------------------------------------------------------------------------


def ucm_written_bytes(model: Model, num_prompt: int, interval_tokens: int, tp_size: int) -> int:
    """Of states UCM stores those that vLLM keeps: as many as there would be boundaries with the
    interval that vLLM was given."""
    block_tokens = model.block_tokens(tp_size)
    prompt = (num_prompt, num_prompt // block_tokens, block_tokens)
    written = 0
    for layers in model.attention:
        kept = kept_blocks(layers.reach, *prompt, interval_tokens)
        written += len(kept) * layers.geometry(block_tokens).page_bytes
    if model.states is not None:
        written += (
            len(kept_blocks(STATE, *prompt, interval_tokens, with_states=True)) * model.state_bytes
        )
    return written


def ucm_read_bytes(model: Model, num_prompt: int, tp_size: int) -> int:
    block_tokens = model.block_tokens(tp_size)
    has_states = model.states is not None
    num_blocks = num_prompt // block_tokens
    end = last_boundary(num_prompt, num_blocks, block_tokens, with_states=has_states)
    if len(model.attention) > 1:
        end = min(end, num_prompt - 1)
    read = len(needed_blocks(STATE, end, block_tokens)) * model.state_bytes
    for layers in model.attention:
        needed = needed_blocks(layers.reach, end, block_tokens)
        read += len(needed) * layers.geometry(block_tokens).page_bytes
    return read


# -- vLLM's fs tier ----------------------------------------------------------------------------


def fs_row_bytes(model: Model, tp_size: int) -> int:
    """A file: a block of any group, of all ranks."""
    block_tokens = model.engine_block_tokens(tp_size)
    layers = model.attention[0]
    copies = 1 if layers.is_mla else tp_size
    rank_bytes = _group_size(model) * block_tokens * layers.rank_token_bytes(tp_size)
    return padded_bytes(rank_bytes * copies)


def fs_written_bytes(
    model: Model, num_prompt: int, retention_interval_tokens: int, tp_size: int
) -> int:
    block_tokens = model.engine_block_tokens(tp_size)
    ends = {(num_prompt - 1) // block_tokens}
    if retention_interval_tokens:
        step = retention_interval_tokens // block_tokens
        ends.update(range(step, num_prompt // block_tokens + 1, step))
    num_rows = _rows(model, num_prompt // block_tokens, ends, block_tokens)
    return num_rows * fs_row_bytes(model, tp_size)


def fs_read_bytes(model: Model, num_prompt: int, tp_size: int) -> int:
    """With the default retention interval."""
    block_tokens = model.engine_block_tokens(tp_size)
    last = (num_prompt - 1) // block_tokens
    num_blocks = last if model.states is not None else num_prompt // block_tokens
    return _rows(model, num_blocks, {last}, block_tokens) * fs_row_bytes(model, tp_size)


def _rows(model: Model, num_blocks: int, ends: set[int], block_tokens: int) -> int:
    """Of full attention the first blocks, of the rest what is needed at the ends of some."""
    size, rows = _group_size(model), 0
    for layers in model.attention:
        of_window = _window_blocks(layers.reach, ends, block_tokens)
        num_rows = num_blocks if layers.reach == ALL else len(of_window)
        rows += blocks_of(layers.count, size) * num_rows
    if model.states is not None:
        rows += blocks_of(model.states.count, size) * len(ends - {0})
    return rows


def _window_blocks(reach: Reach, ends: set[int], block_tokens: int) -> set[int]:
    need = blocks_of(reach.num_tokens - 1, block_tokens)
    return {block for end in ends for block in range(max(0, end - need), end)}


def _group_size(model: Model) -> int:
    """The layers of a group: all groups of a model have as many."""
    counts = [layers.count for layers in model.attention]
    counts += [] if model.states is None else [model.states.count]
    is_mostly_one_size = max(counts) < min(counts) * _MOSTLY_ONE_SIZE
    return max(counts) if is_mostly_one_size else min(counts)


# -- the tables --------------------------------------------------------------------------------


def shapes_table(tp_size: int) -> Iterator[str]:
    yield from _head("model", "strands", "KV per token", "block, tokens: UCM", "vLLM")
    for model in MODELS:
        blocks = (model.block_tokens(tp_size), model.engine_block_tokens(tp_size))
        cells = "; ".join(_strand_texts(model))
        per_token = f"{_number(model.token_bytes / 1024)} KiB"
        yield _line(model.name, cells, per_token, *map(str, blocks))


def bytes_table(prompts: Sequence[int], tp_size: int) -> Iterator[str]:
    yield from _head(
        *("model", "prompt", "UCM", "UCM, `window_interval: 0`", "fs tier"),
        *("fs tier, UCM's interval", "a hit: UCM", "fs tier"),
    )
    for model in MODELS:
        interval = model.interval_tokens(tp_size)
        for num_prompt in prompts:
            written = (
                ucm_written_bytes(model, num_prompt, interval, tp_size),
                ucm_written_bytes(model, num_prompt, 0, tp_size),
                fs_written_bytes(model, num_prompt, 0, tp_size),
                fs_written_bytes(model, num_prompt, interval, tp_size),
            )
            read = (
                ucm_read_bytes(model, num_prompt, tp_size),
                fs_read_bytes(model, num_prompt, tp_size),
            )
            yield _line(
                *(model.name, str(num_prompt)),
                *(f"{_number(each / num_prompt * 1000 / (1 << 20))} MiB" for each in written),
                *(f"{_number(each / (1 << 20))} MiB" for each in read),
            )


def _strand_texts(model: Model) -> Iterator[str]:
    for layers in model.attention:
        heads = "one head" if layers.kv_heads == 1 else f"{layers.kv_heads} heads"
        size = f"{layers.k_size}, no V" if layers.is_mla else str(layers.k_size)
        yield f"`{layers.reach}`: {layers.count} layers, {heads} of {size}"
    if model.states is not None:
        state_mib = model.state_bytes / (1 << 20)
        yield f"`{STATE}`: {model.states.count} layers, {_number(state_mib)} MiB"


def _head(*cells: str) -> Iterator[str]:
    yield _line(*cells)
    yield _line(*("---" for _ in cells))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    args = parser.parse_args()
    print(*shapes_table(args.tensor_parallel_size), sep="\n", end="\n\n")
    print(*bytes_table(args.prompts, args.tensor_parallel_size), sep="\n")


if __name__ == "__main__":
    main()
