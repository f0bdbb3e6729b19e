"""Which versions of vLLM this connector runs on, and what differs between them.

What older ones lack is told by what they have, wherever that says it; nothing else in this folder
asks which version it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, Final

from ucm.errors import UnsupportedEngine
from ucm.integration.engine.dump_state import DeviceBlocks

logger = logging.getLogger(__name__)

# Before it nobody has tried.
OLDEST: Final = (0, 23)
# vLLM's offloading tells a tier where in its prompt a row lies.
OLDEST_TIERING: Final = (0, 31)
NEWEST_TRIED: Final = (0, 33)


def check_version(
    version: str, *, oldest: tuple[int, int] = OLDEST, who: str = "UCM's connector"
) -> None:
    """Raises UnsupportedEngine for one that is too old for `who`, and warns of one that is newer
    than what was tried. What has no number is taken for what somebody builds today."""
    release = _release(version)
    if release is None:
        return
    if release < oldest:
        raise UnsupportedEngine(
            f"this is vLLM {version}, and {who} needs {_text(oldest)} or a later one: update vLLM"
        )
    if release > NEWEST_TRIED:
        logger.warning(
            "this is vLLM %s, and UCM was tried with versions up to %s",
            version,
            _text(NEWEST_TRIED),
        )


def tells_failed_requests() -> bool:
    """Whether a rank can say whose load has failed. Before 0.30 it names blocks alone."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    return hasattr(KVConnectorBase_V1, "get_transfer_results")


def hybrid_support() -> Any:
    """vLLM's mark of connectors that know its groups of layers, a class to derive from. Of several
    groups blocks don't tell whose load has failed: who names blocks alone is to have one."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

    return SupportsHMA if tells_failed_requests() else object


def refuse_what_fails_untold(*, one_plain_group: bool) -> None:
    """Raises UnsupportedEngine."""
    if not one_plain_group and not tells_failed_requests():
        raise UnsupportedEngine(
            "this model has layers with windows or of several kinds, and this vLLM can't be told "
            "which of its requests could not be loaded: use vLLM 0.30 or a later one"
        )


class BlockTables:
    """The device blocks of the requests of a step. Since 0.30 vLLM tells them; before, it tells
    what is new, 0.29 with the whole table of those that it names."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[list[int]]] = {}

    def of_step(self, output: Any) -> Callable[[str], DeviceBlocks]:
        """Call it once a step. Good for the requests that are scheduled in it, until the next."""
        state = getattr(output, "kv_connector_block_state", None)
        told: Callable[[str], DeviceBlocks] | None = getattr(state, "get_block_ids", None)
        if told is not None:
            return told
        for request_id in output.finished_req_ids:
            self._blocks.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self._blocks[new.req_id] = [list(group) for group in new.block_ids]
        cached = output.scheduled_cached_reqs
        for request_id, more in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._blocks.pop(request_id, None)
            if more is not None:
                known = self._blocks.setdefault(request_id, [[] for _ in more])
                for group, blocks in zip(known, more, strict=True):
                    group.extend(blocks)
        for request_id, table in getattr(state, "block_ids", {}).items():
            self._blocks[request_id] = [list(group) for group in table]
        return lambda request_id: tuple(self._blocks[request_id])


def boundary_offers(output: Any) -> dict[str, list[tuple[int, int, int]]]:
    """The states that vLLM has in this step, by request: group, block, after how many tokens."""
    offers: dict[str, list[tuple[int, int, int]]]
    offers = output.kv_connector_block_state.boundary_state_offloads
    return offers


def writes_before_hooks(output: Any) -> bool:
    """Whether a step zeroes or copies blocks on its own; some runners do it before any hook."""
    zeroed = getattr(output, "new_block_ids_to_zero", None)
    return bool(zeroed or getattr(output, "kv_cache_block_copies", None))


def tokens_per_state(spec: Any) -> Any:
    return getattr(spec, "tokens_per_state", getattr(spec, "compress_ratio", 1))


def packs_states(spec: Any) -> bool:
    """Whether an attention layer's block holds anything but the K and V of each of its tokens.
    Before 0.28 only the number of its bytes tells, which leaves out the scales of single heads."""
    if tokens_per_state(spec) != 1:
        return True
    if hasattr(spec, "state_content_bytes"):
        return spec.state_content_bytes is not None
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    token_size = spec.head_size if isinstance(spec, MLAAttentionSpec) else _kv_size(spec)
    plain_bytes = spec.block_size * spec.num_kv_heads * token_size * spec.dtype.itemsize
    return bool(spec.kv_quant_mode.is_per_token_head or block_bytes(spec) != plain_bytes)


def _kv_size(spec: Any) -> int:
    return int(spec.head_size + getattr(spec, "head_size_v", spec.head_size))


def block_bytes(spec: Any) -> int:
    """What of a block is used."""
    new_name = hasattr(spec, "unpadded_page_size_bytes")
    return int(spec.unpadded_page_size_bytes if new_name else spec.real_page_size_bytes)


def hides_unlike_specs(kv_cache_config: Any, group: Any) -> bool:
    """Whether the layers of a group have several specs and vLLM's scheduler is not told how they
    lie in memory. Only a rank knows then."""
    tells = all(hasattr(each, "layers") for each in kv_cache_config.kv_cache_tensors)
    return not tells and len(getattr(group.kv_cache_spec, "kv_cache_specs", ())) > 0


def runs_of_specs(kv_cache_config: Any, names: set[str]) -> list[Any]:
    """The tensors that hold these layers, one for each of their specs. Before 0.29 there is one for
    each layer, whatever its spec."""
    tensors = kv_cache_config.kv_cache_tensors
    return [each for each in tensors if names.intersection(getattr(each, "layers", ()))]


def head_major_layout(vllm_config: Any) -> str:
    """What vLLM calls a KV cache in which the tokens of a head lie together."""
    return "LBHNC" if hasattr(vllm_config.cache_config, "kv_cache_layout") else "HND"


def layout_in_use(vllm_config: Any) -> str | None:
    """None if vLLM doesn't say."""
    layout: str | None = getattr(vllm_config.cache_config, "kv_cache_layout", None)
    return layout


def release_text(version: str) -> str:
    """As in 0.32; what has no number as it is."""
    release = _release(version)
    return version if release is None else _text(release)


def _release(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
