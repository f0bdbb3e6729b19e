"""Our backend has what SGLang calls: by the recorded interface, and by SGLang's own where it is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from tests.integration.sglang.instances import CLASS, extra_config, sglangs
from tests.integration.sglang.recorded import (
    SIGNATURES,
    STORAGE_BATCH_SIZE,
    ExtraInfo,
    StorageConfig,
)
from tests.store.node.support import Place
from ucm.integration.sglang.hicache import UcmHiCache
from ucm.integration.sglang.served_model import read_served_model


def parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_method_takes_what_sglang_gives_it(name: str) -> None:
    assert parameters(getattr(UcmHiCache, name)) == SIGNATURES[name]


def test_the_class_is_where_the_documents_say() -> None:
    assert CLASS["module_path"] == UcmHiCache.__module__
    assert CLASS["class_name"] == UcmHiCache.__name__


def test_the_door_needs_no_engine_and_no_torch() -> None:
    """In an interpreter that has neither, it imports."""
    code = (
        "import sys\n"
        "for name in ('sglang', 'vllm', 'torch'): sys.modules[name] = None\n"
        "from ucm.integration.sglang.hicache import UcmHiCache\n"
        "print(UcmHiCache.__mro__[1].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("object\n", "")


# -- with SGLang ---------------------------------------------------------------------------------


@pytest.fixture
def sglang() -> Any:
    return sglangs("mem_cache.hicache_storage")


def test_the_recorded_interface_is_sglangs(sglang: Any) -> None:
    assert issubclass(UcmHiCache, sglang.HiCacheStorage)
    for name, recorded in SIGNATURES.items():
        assert parameters(getattr(sglang.HiCacheStorage, name)) == recorded, name
    abstract = sglang.HiCacheStorage.__abstractmethods__
    assert abstract <= SIGNATURES.keys()
    for ours, theirs in (
        (StorageConfig, sglang.HiCacheStorageConfig),
        (ExtraInfo, sglang.HiCacheStorageExtraInfo),
    ):
        assert [each.name for each in fields(ours)] == [each.name for each in fields(theirs)]
    assert sglang.STORAGE_BATCH_SIZE == STORAGE_BATCH_SIZE


@pytest.mark.filterwarnings("default")
def test_sglangs_factory_makes_our_backend(sglang: Any, place: Place) -> None:
    factory = sglangs("mem_cache.storage.backend_factory")
    config = sglang.HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=True,
        is_page_first_layout=True,
        model_name="tiny",
        extra_config=extra_config(place),
    )
    backend = factory.StorageBackendFactory.create_backend("dynamic", config, object())
    assert isinstance(backend, UcmHiCache)
    assert backend.batch_exists(["no pool yet"]) == 0
    backend.counts.note_transfer(is_load=True, num_pages=3, nbytes=4_000_000_000, took_s=2.0)
    stats = backend.get_stats()
    assert (stats.prefetch_pgs, stats.prefetch_bandwidth) == ([3], [2.0])
    assert (stats.backup_pgs, stats.backup_bandwidth) == ([], [])
    backend.close()


@pytest.mark.filterwarnings("default")
def test_what_the_server_was_started_with_is_read_where_sglang_keeps_it(sglang: Any) -> None:
    contexts = sglangs("runtime_context")
    given: dict[str, Any] = {
        "model_path": "/models/tiny",
        "revision": "main",
        "kv_cache_dtype": "fp8_e5m2",
        "quantization": "fp8",
        "json_model_override_args": '{"rope_theta": 5}',
        "context_length": 4096,
        "rl_quant_profile": "/profile",
        "kt_weight_path": "/experts",
    }
    adapters = sglangs("lora.lora_registry")
    given["lora_paths"] = [adapters.LoRARef(lora_name="a", lora_path="/adapters/a")]
    with contexts.get_context().override_server_args(**given):
        served = read_served_model()
    assert served is not None
    assert (served.path, served.json_overrides) == ("/models/tiny", '{"rope_theta": 5}')
    for name in ("revision", "kv_cache_dtype", "quantization", "context_length"):
        assert getattr(served, name) == given[name]
    assert served.other_weights == ("--rl-quant-profile", "--kt-weight-path")
    assert served.adapters == (("a", "/adapters/a"),)
    assert (served.load_format, served.dtype) == ("auto", "auto")
    assert read_served_model() is None, "nothing is made up where there is no server"
