"""When this connector is inside of another one that has taken its name.

A platform's plugin may register a class of its own as UCMConnector, which makes ours and hands it
the hooks that it knows of. Those that it doesn't know never come: the fence before a step's writes
(`WorkerSide.begin` makes up for it), what vLLM asks of the class before there is a connector, whose
load has failed, resets, metrics and the end.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.engine.facts import EngineFacts

logger = logging.getLogger(__name__)

_INSTEAD: Final = (
    'set "kv_connector_module_path": "ucm.integration.vllm.ucm_connector" in --kv-transfer-config'
)


def is_made_by_another(transfer: Any, ours: type) -> bool:
    """Whether vLLM was told a name that stands for another class."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if transfer.kv_connector_module_path:
        return False
    return not issubclass(
        KVConnectorFactory.get_connector_class_by_name(transfer.kv_connector), ours
    )


def warn_of_what_another_keeps() -> None:
    logger.warning(
        "another connector has the name UCMConnector here and made this one inside of it: it keeps "
        "resets of the cache from UCM, so after an update of weights KV of the old ones would be "
        "loaded, and the metrics too; %s",
        _INSTEAD,
    )


def refuse_what_another_keeps(settings: Settings, facts: EngineFacts) -> None:
    """Raises UnsupportedEngine for what would be wrong without the hooks that don't come."""
    if settings.use_layerwise:
        what = "use_layerwise needs to tell vLLM where to cut its graphs"
    elif len(facts.targets) > 1 or not facts.is_plain:
        what = (
            "this model has layers of several kinds, of which vLLM must be told whose load failed"
        )
    else:
        return
    raise UnsupportedEngine(
        f"{what}, and another connector that has the name UCMConnector here keeps that from it: "
        f"{_INSTEAD}"
    )
