"""What a model is given beside tokens (pictures, videos, sounds, embeddings), named by content.

vLLM's own identifier of an item is no name of its content: it may be the client's word for it, a
hash of that word, or a number counted by its process, and nothing says which. What the model is
given is the tensors of the request's features: their digest is the name, the same in every vLLM
and under every path of the model. Processor settings, of the server or of the request, have done
their work in them; what the encoder goes by besides is in every name (`encoder.py`).

Where the scheduler doesn't have the tensors (vLLM's shared-memory picture cache, encoders that run
elsewhere, tensors on a device) the item has no name, and neither has what follows it.

vLLM keeps what its encoder has made of an item under the item's identifier. One that has stood for
two contents may thus bring the wrong one's: from then on it names nothing here.
"""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from ucm.integration.engine.naming import ItemNames
from ucm.integration.engine.prompt import NamedItems
from ucm.store.blocks.keys import Item

_FORMAT: Final = b"ucm-item-1"
# What vLLM's shared-memory cache hands to the scheduler in place of the tensors.
_HANDLE: Final = frozenset({"address", "monotonic_id"})
# Which tokens of the whole prompt stand for items: up to 0.26 vLLM's own classes for models of
# transformers have it in the item, of the prompt that came with it first. Tokens have their names.
_OF_THE_PROMPT: Final = frozenset({"mm_token_type_ids"})
# Far more than an encoder's cache has room for: every item there takes a token at least.
_MAX_IDENTIFIERS: Final = 65_536


class Unnameable(Exception):  # caught in this file
    """A value whose bytes can't be had here."""


class VllmItems(ItemNames):
    """Remembers digests as long as vLLM keeps the tensors."""

    def __init__(self, block_tokens: int, encoder_rules: str = "") -> None:
        """`encoder_rules` is what else decides what becomes of an item's tensors."""
        self._block_tokens = block_tokens
        self._encoder = hashlib.sha256(encoder_rules.encode()).digest()
        self._digests: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        self._contents: OrderedDict[str, bytes | None] = OrderedDict()

    def of_request(self, request: Any) -> NamedItems:
        if request.prompt_embeds is not None:
            is_token = getattr(request, "prompt_is_token_ids", None)
            return embedded_items(request.prompt_embeds, is_token, self._block_tokens)
        lora = request.lora_request
        adapter = "" if lora is None else f"{lora.lora_int_id}:{lora.lora_path}"
        return self.of(request.mm_features, adapter=adapter)

    def of(self, features: Sequence[Any], *, adapter: str = "") -> NamedItems:
        """`features` are the request's, `adapter` names the one that its encoder may use."""
        named: list[Item] = []
        end: int | None = None
        for feature in sorted(features, key=lambda feature: int(feature.mm_position.offset)):
            place = feature.mm_position
            digest = self._digest(feature)
            if self._is_ambiguous(feature, digest, adapter) or digest is None:
                end = int(place.offset) if end is None else end
            else:
                content = _with_mask(self._encoder + digest, place).hex()
                named.append(Item(content, int(place.offset), int(place.length)))
        return NamedItems(tuple(named), end)

    def forget(self) -> None:
        """vLLM has emptied its caches."""
        self._contents.clear()

    def _digest(self, feature: Any) -> bytes | None:
        data = feature.data
        if data is None:
            return None
        known = self._digests.get(id(data))
        if known is not None and known[0]() is data:
            return known[1]
        try:
            digest = content_digest(feature.modality, data)
        except Unnameable:
            return None
        key = id(data)
        self._digests[key] = weakref.ref(data, lambda _: self._digests.pop(key, None)), digest
        return digest

    def _is_ambiguous(self, feature: Any, digest: bytes | None, adapter: str) -> bool:
        """Whether the identifier has stood for another content than this."""
        name = str(feature.identifier)
        # vLLM puts the adapter's name before it where the encoder uses the adapter.
        used = adapter if name != feature.mm_hash else ""
        content = None if digest is None else digest + used.encode("utf-8", "surrogatepass")
        if self._contents.setdefault(name, content) != content:
            self._contents[name] = None
        self._contents.move_to_end(name)
        while len(self._contents) > _MAX_IDENTIFIERS:
            self._contents.popitem(last=False)
        return self._contents[name] is None


def content_digest(modality: str, data: Mapping[str, Any]) -> bytes:
    """SHA-256 over the names and values of what the model is given. Raises Unnameable."""
    if data.keys() >= _HANDLE:
        raise Unnameable("a handle of vLLM's shared-memory cache")
    digest = hashlib.sha256(_FORMAT)
    _add(digest, modality)
    _add(digest, {name: data[name].data for name in data if name not in _OF_THE_PROMPT})
    return digest.digest()


def embedded_items(embeds: Any, is_token: Sequence[bool] | None, block_tokens: int) -> NamedItems:
    """A prompt given as embeddings: each block's are an item of their own. `is_token` says where
    tokens stand among them."""
    items: list[Item] = []
    for start in range(0, len(embeds), block_tokens):
        rows = embeds[start : start + block_tokens]
        digest = hashlib.sha256(_FORMAT)
        try:
            mask = None if is_token is None else list(is_token[start : start + block_tokens])
            _add(digest, ("prompt_embeds", rows, mask))
        except Unnameable:
            return NamedItems(tuple(items), start)
        items.append(Item(digest.hexdigest(), start, len(rows)))
    return NamedItems(tuple(items))


def _with_mask(digests: bytes, place: Any) -> bytes:
    """Where not all tokens of an item stand for it, which do is a part of what it is."""
    mask = getattr(place, "is_embed", None)
    masked = hashlib.sha256(digests)
    if mask is not None and not bool(mask.all()):
        _add(masked, mask)
    return masked.digest()


def _add(digest: hashlib._Hash, value: object) -> None:
    """Every value says its kind and its length first: no two spell the same bytes."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        _add_array(digest, value)
    elif isinstance(value, (bytes, bytearray)):
        _head(digest, "bytes", len(value))
        digest.update(value)
    elif isinstance(value, Mapping):
        _head(digest, "map", len(value))
        for name in sorted(value, key=str):
            _add(digest, str(name))
            _add(digest, value[name])
    elif isinstance(value, (list, tuple)):
        _head(digest, "list", len(value))
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value).encode("utf-8", "backslashreplace")
        _head(digest, type(value).__name__, len(text))
        digest.update(text)
    else:
        raise Unnameable(f"a {type(value).__name__}")


def _add_array(digest: hashlib._Hash, value: torch.Tensor | np.ndarray[Any, Any]) -> None:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise Unnameable("an array of objects")
        shape, dtype = value.shape, value.dtype.str
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    else:
        if value.device.type != "cpu" or value.layout is not torch.strided:
            raise Unnameable(f"a tensor on {value.device}")
        shape, dtype = tuple(value.shape), str(value.dtype)
        flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        # To torch fewer than two numbers are contiguous whatever their stride, but not to view().
        data = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()
    _head(digest, f"{dtype}{list(shape)}", data.nbytes)
    digest.update(data.data)


def _head(digest: hashlib._Hash, kind: str, length: int) -> None:
    text = kind.encode()
    digest.update(struct.pack("<IQ", len(text), length) + text)
