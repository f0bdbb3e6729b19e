"""What rows are called, who may share them, and what a hand-off promises of them."""

from __future__ import annotations

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_offload.base import make_offload_key

from tests.integration.tiering.rows import ROW_BYTES, manifest
from ucm import handoff as h
from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UnsupportedEngine
from ucm.integration.tiering.engine import Engine, engine_of_tier, making
from ucm.integration.tiering.identity import row_manifest, waited_group
from ucm.integration.tiering.promises import RowsPromised, WaitedGroup, awaited, promise_of
from ucm.integration.tiering.rows import HostRows, RowNames
from ucm.store.blocks.namespace import differences, fingerprint

SETTINGS = Settings(store=StoreSettings(socket_path=""), model_id="the model")
FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64
)
OTHER_ROPE = SimpleNamespace(to_dict=lambda: {"rope_theta": 500_000})
STATES = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))


def test_the_key_of_a_row_is_pinned() -> None:
    """Another one would lose what all engines have stored."""
    names = RowNames(manifest())
    name = make_offload_key(sha256(b"tokens").digest(), 3)

    start = b"ucm-tiering-key-1" + fingerprint(manifest())
    assert names.key(name) == sha256(start + sha256(b"tokens").digest() + b"\0\0\0\3").digest()
    assert names.key(name) != RowNames(manifest(epoch=1)).key(name)
    assert names.key(name) != names.key(make_offload_key(sha256(b"tokens").digest(), 4))


def test_no_row_lies_outside_of_the_host_memory() -> None:
    memory = bytearray(3 * ROW_BYTES)
    rows = HostRows.of(memoryview(memory).cast("B", shape=[3, ROW_BYTES]))

    assert rows.row(2) - rows.row(0) == 2 * ROW_BYTES
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"row {number}"):
            rows.row(number)


# -- who shares ------------------------------------------------------------------------------


def engine(spec: Any = FULL, **changes: Any) -> Engine:
    """As much of vLLM's configuration as names rows. `changes` are of its parts, as "part.name"."""
    config = {
        "lora_config": None,
        "speculative_config": None,
        "attention_config": "attention",
        "use_v2_model_runner": False,
        "instance_id": "i",
        "load_config": SimpleNamespace(load_format="auto"),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1),
        "scheduler_config": SimpleNamespace(enable_chunked_prefill=True),
        "cache_config": SimpleNamespace(
            cache_dtype="auto", prefix_caching_hash_algo="sha256", enable_prefix_caching=True
        ),
        "model_config": SimpleNamespace(
            dtype=torch.float32,
            hf_text_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 10_000}),
            hf_config=SimpleNamespace(),
            max_model_len=4096,
            quantization=None,
            multimodal_config=None,
            is_prefix_caching_supported=True,
        ),
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(config[part], field, value)
        else:
            config[part] = value
    groups = [SimpleNamespace(kv_cache_spec=spec)]
    return Engine(SimpleNamespace(**config), SimpleNamespace(kv_cache_groups=groups))


def spec_of(**changes: Any) -> Any:
    fields = {
        "groups": [
            SimpleNamespace(group_id=0, tokens_per_block=16, layer_names=("layers.0", "layers.1"))
        ],
        "kv_cache_layout": "LBNHC",
        "canonical_layout": False,
        "parallel": SimpleNamespace(world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1),
        "replicated_layout": False,
        "blocks_per_chunk": 1,
        "tokens_per_hash": 16,
        **changes,
    }
    top = ("replicated_layout", "blocks_per_chunk", "tokens_per_hash")
    config = SimpleNamespace(**{name: fields[name] for name in fields if name not in top})
    return SimpleNamespace(config=config, **{name: fields[name] for name in top})


def named(of: Engine, spec: Any, settings: Settings = SETTINGS, row_bytes: int = ROW_BYTES) -> Any:
    return row_manifest(of, spec, settings, row_bytes=row_bytes, block_tokens=16, epoch=0)


def test_equal_engines_share_whatever_they_are_called() -> None:
    one, other = named(engine(), spec_of()), named(engine(instance_id="j"), spec_of())

    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    ("of", "spec", "row_bytes", "field"),
    [
        (engine(model_config__hf_text_config=OTHER_ROPE), spec_of(), ROW_BYTES, "rope_theta"),
        (engine(model_config__dtype=torch.bfloat16), spec_of(), ROW_BYTES, "model_dtype"),
        (engine(cache_config__cache_dtype="fp8"), spec_of(), ROW_BYTES, "kv_dtype"),
        (engine(cache_config__prefix_caching_hash_algo="sha256_cbor"), spec_of(), 1, "algorithm"),
        (engine(attention_config="another"), spec_of(), ROW_BYTES, "kernels"),
        (engine(use_v2_model_runner=True), spec_of(), ROW_BYTES, "runner"),
        (engine(WINDOW), spec_of(), ROW_BYTES, "groups"),
        (engine(), spec_of(kv_cache_layout="LBHNC"), ROW_BYTES, "layout"),
        (engine(), spec_of(canonical_layout=True), ROW_BYTES, "canonical"),
        (engine(), spec_of(replicated_layout=True), ROW_BYTES, "one_copy"),
        (engine(), spec_of(blocks_per_chunk=2), ROW_BYTES, "blocks_per_chunk"),
        (engine(), spec_of(tokens_per_hash=8), ROW_BYTES, "tokens_per_hash"),
        (
            engine(),
            spec_of(
                parallel=SimpleNamespace(world_size=2, tp_size=2, pp_size=1, pcp_size=1, dcp_size=1)
            ),
            ROW_BYTES,
            "tp_size",
        ),
        (engine(), spec_of(), ROW_BYTES * 2, "k_size"),
    ],
)
def test_unlike_models_and_layouts_share_nothing_and_are_told_in_what_they_differ(
    of: Engine, spec: Any, row_bytes: int, field: str
) -> None:
    one, other = named(engine(), spec_of()), named(of, spec, row_bytes=row_bytes)

    lines = differences(one, other)
    assert any(field in line.partition(":")[0] for line in lines), lines


def test_another_model_shares_nothing() -> None:
    other = Settings(store=StoreSettings(socket_path=""), model_id="another model")

    assert fingerprint(named(engine(), spec_of())) != fingerprint(named(engine(), spec_of(), other))


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (engine(lora_config=SimpleNamespace()), "--enable-lora"),
        (
            engine(model_config__multimodal_config=SimpleNamespace(language_model_only=False)),
            "--language-model-only",
        ),
        (engine(cache_config__prefix_caching_hash_algo="xxhash"), "--prefix-caching-hash-algo"),
        (
            engine(
                model_config__is_prefix_caching_supported=False, model_config__pooler_config=None
            ),
            "could not use",
        ),
    ],
)
def test_what_vllms_names_leave_out_is_refused(of: Engine, words: str) -> None:
    with pytest.raises(UnsupportedEngine, match=words):
        named(of, spec_of())


def test_a_tier_of_an_engine_that_nobody_has_told_of_is_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="UCMOffloadingConnector"):
        engine_of_tier()
    made = engine()
    with making(made):
        assert engine_of_tier() is made


@pytest.mark.parametrize(
    ("specs", "number", "keeps_all"),
    [
        ([FULL], 0, True),
        ([WINDOW, FULL, FULL], 1, True),
        ([STATES, FULL], 1, True),
        ([WINDOW], 0, False),
    ],
)
def test_the_group_that_is_waited_for_is_the_one_of_which_most_is_kept(
    specs: list[Any], number: int, keeps_all: bool
) -> None:
    of = engine()
    of.kv_cache_config.kv_cache_groups[:] = [SimpleNamespace(kv_cache_spec=each) for each in specs]
    groups = [
        SimpleNamespace(group_id=i, tokens_per_block=16, layer_names=()) for i in range(len(specs))
    ]

    found = waited_group(of, spec_of(groups=groups, blocks_per_chunk=2))
    assert found == WaitedGroup(number=number, chunk_tokens=32, keeps_all=keeps_all)


# -- promises --------------------------------------------------------------------------------

GROUP = WaitedGroup(number=0, chunk_tokens=16, keeps_all=True)
NAMES = RowNames(manifest())
KEYS = [NAMES.key(make_offload_key(sha256(b"%d" % i).digest(), 0)) for i in range(4)]
OTHERS = [NAMES.key(make_offload_key(sha256(b"%d" % i).digest(), 1)) for i in range(4)]
ASKED = {
    **{key: (1, (i + 1) * 16) for i, key in enumerate(OTHERS)},
    **{key: (0, (i + 1) * 16) for i, key in reversed(list(enumerate(KEYS)))},
}


def test_all_rows_of_the_waited_group_are_waited_for_in_the_order_of_the_prompt() -> None:
    assert awaited(RowsPromised(1.0), ASKED, GROUP) == KEYS
    assert awaited(RowsPromised(1.0, 48, KEYS[2].hex()), ASKED, GROUP) == KEYS[:3]


def test_of_a_group_with_windows_the_last_row_alone_is_waited_for() -> None:
    windows = WaitedGroup(number=1, chunk_tokens=16, keeps_all=False)

    assert awaited(RowsPromised(1.0), ASKED, windows) == OTHERS[3:]


def test_a_receipt_of_another_prompt_is_not_waited_for() -> None:
    assert awaited(RowsPromised(1.0, 48, KEYS[3].hex()), ASKED, GROUP) == []
    assert awaited(RowsPromised(1.0, 8, KEYS[0].hex()), ASKED, GROUP) == []


def test_what_is_said_to_a_request_is_a_promise_or_it_is_not() -> None:
    def of(words: h.Handoff | None) -> RowsPromised | str | None:
        params = h.params(words) if words is not None else None
        return promise_of(params, fingerprint=NAMES.fingerprint, group=GROUP, settings=SETTINGS)

    receipt = h.Receipt(
        namespace=NAMES.fingerprint.hex(),
        block_tokens=16,
        tokens=48,
        key=KEYS[2].hex(),
        issued_s=1.0,
    )
    assert of(receipt) == RowsPromised(5.0, 48, KEYS[2].hex())
    assert of(h.Expected()) == RowsPromised(30.0)
    for words in (None, h.Wanted(), h.Withdrawn()):
        assert of(words) is None
    foreign = h.Receipt(
        namespace="0" * 64, block_tokens=16, tokens=48, key=KEYS[2].hex(), issued_s=1.0
    )
    assert of(foreign) == "refused_namespace"
