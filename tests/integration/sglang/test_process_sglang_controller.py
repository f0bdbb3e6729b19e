"""SGLang's own cache controllers, with their threads, over its own host pools and our backend.

Skipped where SGLang can't be imported, as in the suite's own environment. What it needs of a
machine (an accelerator, a process group) is replaced by what says that there is one rank; what is
tested is the way from its factory to its acknowledgements.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Queue
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.integration.sglang.instances import extra_config, sglangs
from tests.integration.sglang.recorded import MHATokenToKVPoolHost, MLATokenToKVPoolHost
from tests.store.node.support import SOON_S, Place, wait_until

controllers = sglangs("managers.cache_controller")
hybrid = sglangs("mem_cache.hybrid_cache.hybrid_cache_controller")
groups = sglangs("mem_cache.pool_host.group")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("default")]

PAGE_TOKENS, NUM_LAYERS, NUM_HEADS, HEAD_SIZE, DEVICE_TOKENS = 16, 3, 2, 8, 128
TOKENS = list(range(1, 6 * PAGE_TOKENS + 1))


def pointers(tensors: Any) -> Any:
    return torch.tensor([each.data_ptr() for each in tensors], dtype=torch.uint64)


def mha_pool(layout: str) -> Any:
    from sglang.srt.mem_cache import device_pool_info as info
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost as SglangPool

    k, v = (
        tuple(
            torch.zeros(DEVICE_TOKENS, NUM_HEADS, HEAD_SIZE).bfloat16() for _ in range(NUM_LAYERS)
        )
        for _ in range(2)
    )
    buffers = info.KVBuffers(
        k=k,
        v=v,
        k_data_ptrs=pointers(k),
        v_data_ptrs=pointers(v),
        layout=info.KVBufferLayout.NHD,
    )
    described = info.MHABufferInfo(
        buffers=buffers,
        page_size=PAGE_TOKENS,
        head_num=NUM_HEADS,
        head_dim=HEAD_SIZE,
        v_head_dim=HEAD_SIZE,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return host_pool(SglangPool, described, layout)


def mla_pool(layout: str) -> Any:
    from sglang.srt.mem_cache import device_pool_info as info
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost as SglangPool

    rows = tuple(torch.zeros(DEVICE_TOKENS, 1, 32).bfloat16() for _ in range(NUM_LAYERS))
    described = info.MLABufferInfo(
        buffers=rows,
        data_ptrs=pointers(rows),
        layer_indices=tuple(range(NUM_LAYERS)),
        device_layer_num=NUM_LAYERS,
        page_size=PAGE_TOKENS,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        kv_cache_dim=32,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return host_pool(SglangPool, described, layout, target_layer_num=NUM_LAYERS)


def host_pool(kind: Any, described: Any, layout: str, **more: Any) -> Any:
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope

    with host_memory_budget_scope(1 << 30):
        return kind(
            described,
            2.0,
            0,
            PAGE_TOKENS,
            layout,
            pin_memory=False,
            device="cpu",
            device_capacity_tokens=DEVICE_TOKENS,
            start_layer=0,
            end_layer=NUM_LAYERS,
            **more,
        )


class DecodeRank(controllers.HiCacheController):  # type: ignore[misc]
    """Of a decode server that stores. Without a device: what its constructor sets for storage."""

    host_pools: ClassVar[dict[str, Any]] = {}
    request = "a request"

    def __init__(self, pool: Any) -> None:
        self.mem_pool_host = self.storage_host_pool = pool
        self.mem_pool_device = object()
        self.page_size = PAGE_TOKENS
        self.host_memory_mode = "cache"
        self.enable_storage = self.enable_storage_metrics = False
        self.storage_backend = None
        self.attn_cp_group = self.attn_tp_group = self.pp_group = None
        self.storage_stop_event = threading.Event()
        self.ack_prefetch_queue = Queue[Any]()

    def _create_sync_groups(self) -> list[Any]:
        return []


class Rank(hybrid.HybridCacheController):  # type: ignore[misc]
    """Of any other server, whose pool is a group's, of one. As above."""

    request = hybrid.CacheRequestHandle("a request", 0)
    _create_sync_groups = DecodeRank._create_sync_groups

    def __init__(self, pool: Any) -> None:
        DecodeRank.__init__(self, pool)
        entry = groups.PoolEntry(
            name=hybrid.PoolName.KV,
            host_pool=pool,
            device_pool=object(),
            layer_mapper=lambda layer: layer,
            is_primary_index_anchor=True,
        )
        self.mem_pool_host = groups.HostPoolGroup([entry])
        self.host_pools = {"host_pools": self.mem_pool_host.entries}
        self.pp_prefetch_command_group = self.pp_prefetch_command_thread = None
        self.pp_prefetch_state_lock = threading.Lock()
        self.pp_prefetch_states: dict[str, Any] = {}
        self.pp_prefetch_decisions: dict[str, Any] = {}


@pytest.fixture
def attach(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    alone = SimpleNamespace(attn_dcp_size=1, attn_dcp_rank=0, tp_rank=0, tp_size=1)
    alone.pp_rank, alone.pp_size = 0, 1
    monkeypatch.setattr(controllers, "get_parallel", lambda: alone)
    monkeypatch.setattr(controllers, "is_dp_attention_enabled", lambda: False)
    attached: list[Any] = []

    def make(pool: Any, socket: str = "a", kind: type = Rank) -> Any:
        one = kind(pool)
        one.attach_storage_backend(
            "dynamic",
            prefetch_threshold=PAGE_TOKENS,
            model_name="served-name",
            storage_backend_extra_config=extra_config(place, socket),
            **one.host_pools,
        )
        attached.append(one)
        return one

    yield make
    for one in attached:
        one.detach_storage_backend()


def random_pages(pool: Any) -> None:
    """What the model has computed."""
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))


def page_of(pool: Any, index: Any) -> Any:
    return pool.get_data_page(index, flat=True).clone()


def starts(indices: Any) -> list[int]:
    return [int(index) for index in indices[::PAGE_TOKENS]]


def backup(one: Any, indices: Any) -> int:
    """Tokens that SGLang takes for stored."""
    hashes = controllers.get_storage_hash_str(TOKENS, None, page_size=PAGE_TOKENS)
    one.write_storage(indices, TOKENS, hash_value=hashes)
    assert one.ack_backup_queue is not None
    done = one.ack_backup_queue.get(timeout=SOON_S)
    return int(done.completed_tokens)


def prefetch(one: Any) -> tuple[int, Any]:
    """Tokens that SGLang takes for loaded, and the pages that they are in."""
    assert one.prefetch_hit_queue is not None
    assert one.prefetch_buffer is not None
    operation = one.prefetch(one.request, TOKENS)
    operation = one.prefetch_hit_queue.get(timeout=SOON_S)
    indices = one.mem_pool_host.alloc(operation.storage_hit_count)
    operation.host_indices = indices
    one.prefetch_buffer.put(operation)
    completed = 0
    while True:
        ack = one.ack_prefetch_queue.get(timeout=SOON_S)
        completed = max(completed, ack.completed_tokens or 0)
        if ack.completed_req:
            return completed, indices


POOLS = {
    **{f"mha {layout}": (mha_pool, layout) for layout in ("layer_first", "page_first")},
    **{f"mha {layout}": (mha_pool, layout) for layout in ("page_first_direct", "page_head")},
    **{f"mla {layout}": (mla_pool, layout) for layout in ("layer_first", "page_first")},
}


@pytest.mark.parametrize("what", POOLS)
@pytest.mark.parametrize("kind", [Rank, DecodeRank])
def test_prefill_backs_up_and_decode_prefetches(
    kind: type, what: str, attach: Callable[..., Any], place: Place
) -> None:
    make_pool, layout = POOLS[what]
    prefill = attach(make_pool(layout), "prefill")
    decode = attach(make_pool(layout), "decode", kind)
    random_pages(prefill.storage_host_pool)
    stored = prefill.mem_pool_host.alloc(len(TOKENS))
    assert backup(prefill, stored) == len(TOKENS)
    wait_until(lambda: len(place.blocks()) == 6, "all pages are files")

    decode.mem_pool_host.alloc(2 * PAGE_TOKENS)
    completed, loaded = prefetch(decode)
    assert completed == len(TOKENS)
    assert starts(loaded) != starts(stored)
    for ours, theirs in zip(starts(loaded), starts(stored), strict=True):
        assert torch.equal(
            page_of(decode.storage_host_pool, ours), page_of(prefill.storage_host_pool, theirs)
        )


def test_a_damaged_file_ends_a_prefetch_before_it(attach: Callable[..., Any], place: Place) -> None:
    prefill = attach(mha_pool("page_first"), "prefill")
    assert backup(prefill, prefill.mem_pool_host.alloc(len(TOKENS))) == len(TOKENS)
    wait_until(lambda: len(place.blocks()) == 6, "all pages are files")
    for file in place.blocks():
        data = bytearray(file.read_bytes())
        data[5000] ^= 1
        file.write_bytes(data)

    decode = attach(mha_pool("page_first"), "decode")
    completed, _ = prefetch(decode)
    assert completed == 0
    assert not decode.storage_host_pool.kv_buffer.any()


@pytest.mark.parametrize(
    ("make_pool", "recorded", "layout"),
    [
        *((mha_pool, MHATokenToKVPoolHost, name) for name in ("layer_first", "page_first")),
        *((mha_pool, MHATokenToKVPoolHost, name) for name in ("page_first_direct", "page_head")),
        *((mla_pool, MLATokenToKVPoolHost, name) for name in ("layer_first", "page_first")),
    ],
)
def test_the_recorded_pools_give_the_addresses_of_sglangs(
    make_pool: Any, recorded: Any, layout: str
) -> None:
    theirs = make_pool(layout)
    ours = recorded(layout, num_pages=theirs.page_num)
    indices = ours.indices([2, 0, 5])
    addresses, sizes = theirs.get_page_buffer_meta(torch.from_numpy(indices))
    base = theirs.kv_buffer.data_ptr()
    recorded_addresses, recorded_sizes = ours.get_page_buffer_meta(indices)
    assert sizes == recorded_sizes
    recorded_base = ours.kv_buffer.ctypes.data
    assert [each - base for each in addresses] == [
        each - recorded_base for each in recorded_addresses
    ]
    names = ("layout", "page_size", "layer_num", "target_layer_num", "start_layer", "end_layer")
    for name in (*names, "storage_format_tag"):
        assert getattr(theirs, name) == getattr(ours, name), name
