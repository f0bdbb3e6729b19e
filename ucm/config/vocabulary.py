"""The names that settings may have: which are ours, and which are UCM 0.8.1's without effect here.

A configuration written for UCM 0.8.1 loads as it stands; what has no effect is named once in a
warning. Any other name is an error: a misspelt setting must not silently be a default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Literal, TypeAlias

from ucm.errors import ConfigError

CONFIG_FILE_KEY: Final = "UCM_CONFIG_FILE"

Place: TypeAlias = Literal["top", "connector", "store"]

# How a place is called in a message: "it belongs ...".
_PLACES: Final[Mapping[Place, str]] = {
    "top": "at the top level",
    "connector": "in ucm_connectors[0]",
    "store": "in ucm_connectors[0].ucm_connector_config",
}


@dataclass(frozen=True)
class UnusedKeys:
    """Settings of UCM 0.8.1 that are accepted without effect, and why they have none."""

    place: Place
    why: str
    keys: tuple[str, ...]


def _unused(place: Place, why: str, keys: str) -> UnusedKeys:
    return UnusedKeys(place=place, why=why, keys=tuple(keys.split()))


UNUSED_KEYS: Final[tuple[UnusedKeys, ...]] = (
    _unused("top", "metrics are always on", "enable_metrics metrics_config metrics_config_path"),
    _unused("top", "requests are not recorded", "enable_record enable_record_traces"),
    _unused(
        "top",
        "there are no modes that pretend",
        "hit_ratio inference_duration_monitor_fake_hit_ratio use_inference_duration_monitor"
        " use_lite",
    ),
    _unused("top", "a page of MLA is stored once for all ranks anyway", "load_only_first_rank"),
    _unused("top", "loads are asynchronous anyway", "use_request_async_load"),
    _unused("top", "one scheduler side decides for all ranks", "use_consistency_manager"),
    _unused(
        "top",
        "every full block is dumped and loaded",
        "load_tokens_threshold persist_token_threshold",
    ),
    _unused("top", "sparse attention is not served", "ucm_sparse_config"),
    _unused(
        "top",
        "windows and states need no settings beside `window_interval` and `block_tokens` "
        "(`docs/models.md`)",
        "hybrid_layerwise_prefetch_rows hybrid_linear_attention_layerwise wa_dump_block_wise",
    ),
    _unused("connector", "there is one store, inside of this package", "ucm_connector_module_path"),
    _unused(
        "store",
        "reclaim looks at as many files as its estimate needs, in one thread for each backend, and"
        " one node at a time does it anyway",
        "posix_gc_candidate_extra_percent posix_gc_concurrency posix_gc_cross_instance_lock"
        " posix_gc_max_recycle_count_per_shard posix_gc_precise_mode posix_gc_shard_sample_ratio"
        " posix_gc_task_timeout_ms",
    ),
    _unused(
        "store",
        "a page is one file, read by posix_read_threads and written by posix_write_threads",
        "data_dir_shard_bytes posix_commit_concurrency posix_data_trans_concurrency"
        " posix_io_engine posix_lookup_concurrency posix_open_concurrency shard_data_dir"
        " stream_number",
    ),
    _unused(
        "store",
        "every wait has a deadline of its own (posix_io_timeout_ms, lookup_timeout_ms,"
        " dump_timeout_ms)",
        "timeout_ms",
    ),
    _unused("store", "the node cache needs no circuit breaker", "store_health"),
    _unused(
        "store",
        "the node cache is shared by all engines and ranks, and has one size",
        "buffer_number cache_load_backend_only cache_load_exclusive_buffer_number"
        " running_queue_depth share_buffer_enable waiting_queue_depth",
    ),
    _unused(
        "store",
        "device copies choose their way themselves",
        "cache_io_aggregation cache_sdma_direct cache_stream_number use_gdr",
    ),
    _unused(
        "store",
        "the engine tells its own geometry",
        "block_size cpu_affinity_cores device_id gpu_kv_buffer_addrs gpu_kv_buffer_sizes"
        " local_rank_size role shard_size tensor_layout tensor_size tensor_size_list unique_id",
    ),
    _unused("store", "there is no Compress stage", "compress_ratio"),
    _unused(
        "store",
        "there is no Mooncake stage",
        "device_name global_segment_size global_segment_size_gb local_buffer_size local_hostname"
        " master_server_address metadata_server protocol replica_num share_buffer_capacity_gb",
    ),
    _unused(
        "store",
        "there is no YuanRong stage",
        "yuanrong_backfill_queue_depth yuanrong_backfill_worker_count"
        " yuanrong_dump_prerequisite_worker_count yuanrong_enable_remote_h2d"
        " yuanrong_h2d_stream_count yuanrong_host yuanrong_host_buffer_capacity_gb"
        " yuanrong_host_buffer_count yuanrong_load_worker_count yuanrong_namespace yuanrong_port"
        " yuanrong_posix_max_inflight_gb yuanrong_recovery_batch_size yuanrong_resource_log_path"
        " yuanrong_resource_metrics_enable yuanrong_resource_metrics_interval_sec"
        " yuanrong_timeout_ms yuanrong_waiting_queue_depth",
    ),
)

# Fields of vLLM's own KV transfer configuration that people put one level too deep.
_VLLM_KEYS: Final = ("kv_role", "kv_load_failure_policy", "kv_buffer_size", "engine_id")


@dataclass(frozen=True)
class Vocabulary:
    """The names of our settings, by place."""

    used: Mapping[Place, Collection[str]]

    def unused(self, place: Place) -> frozenset[str]:
        return frozenset(
            key for group in UNUSED_KEYS if group.place == place for key in group.keys
        ).difference(self.used[place])

    def check(
        self, keys: Iterable[object], *, place: Place, source: str, prefix: str
    ) -> tuple[str, ...]:
        """The keys that are accepted without effect, sorted. Raises ConfigError for a stranger."""
        unused = self.unused(place)
        found: list[str] = []
        for key in keys:
            if not isinstance(key, str):
                where = prefix.rstrip(".") or "top level"
                raise ConfigError(f"{source}: {where}: the key {key!r} is not text, quote it")
            if key in unused:
                found.append(key)
            elif key not in self.used[place]:
                hint = self._hint(key, place=place)
                raise ConfigError(f"{source}: {prefix}{key}: unknown setting{hint}")
        return tuple(sorted(found))

    def _hint(self, key: str, *, place: Place) -> str:
        for other, name in _PLACES.items():
            if other != place and (key in self.used[other] or key in self.unused(other)):
                return f", it belongs {name}"
        if key in _VLLM_KEYS:
            return ", it belongs beside kv_connector_extra_config in --kv-transfer-config"
        if get_close_matches(key.upper(), [CONFIG_FILE_KEY], cutoff=0.8):
            return f", did you mean {CONFIG_FILE_KEY} in kv_connector_extra_config?"
        return did_you_mean(key, {*self.used[place], *self.unused(place)})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message that names the nearest known word; empty when none is near."""
    nearest = get_close_matches(word, sorted(known), n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""
