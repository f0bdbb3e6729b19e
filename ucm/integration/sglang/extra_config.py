"""The settings of UCM in what SGLang was given as --hicache-storage-backend-extra-config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ucm.config.settings import Settings, load_settings
from ucm.errors import ConfigError

SOURCE: Final = "hicache-storage-backend-extra-config"
# SGLang's own keys: how it finds this backend, and what it takes out before it makes one, or, on a
# decode server that stores (--disaggregation-decode-enable-offload-kvcache), does not.
_OF_SGLANG: Final = frozenset(
    {"backend_name", "module_path", "class_name", "interface_v1", "tp_lcm_size"}
    | {"prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token"}
    | {"hicache_storage_pass_prefix_keys"}
)


def settings_of(extra_config: Mapping[str, object] | None) -> Settings:
    """The rest is the tree that vLLM's kv_connector_extra_config has. Raises ConfigError."""
    given = dict(extra_config or {})
    # Without it SGLang hands over copies of pages whose bytes lie in another order.
    if not given.get("interface_v1"):
        raise ConfigError(
            f"{SOURCE}: interface_v1: missing: pages are read and written in place: add "
            f'"interface_v1": 1'
        )
    tree = {name: value for name, value in given.items() if name not in _OF_SGLANG}
    return load_settings(tree, source=SOURCE)
