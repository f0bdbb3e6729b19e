"""What makes bytes comparable: the manifest of a namespace, and its fingerprint.

Two engines share pages exactly when the fingerprints of their manifests are equal. A manifest is
made to be read: it is written beside the pages once, and when two don't agree, `differences` says
by name in what.

    fingerprint = SHA256(canonical JSON of the manifest)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Final

import msgspec

from ucm.errors import UcmError
from ucm.store.blocks.blockfile import VERSION as PAGE_FORMAT
from ucm.store.blocks.canonical_json import canonical_json

MANIFEST_FORMAT: Final = 1
# Of the manifests of models that are more than full attention of one kind, which have `strands`; of
# all others nothing changes.
STRANDS_FORMAT: Final = 2

_FORMATS: Final = (MANIFEST_FORMAT, STRANDS_FORMAT)

_ABSENT: Final = "absent"
# Of mappings and lists in each other; a model's config has three or four.
_MAX_DEPTH: Final = 32


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One namespace. Everything in here must agree for bytes to be shared; nothing else must."""

    format_version: int = MANIFEST_FORMAT
    # Of the bytes of a page and of its file.
    page_format_version: int = PAGE_FORMAT
    block_tokens: int
    model_dtype: str
    kv_dtype: str
    # Where the scales of a quantised KV cache come from; they are part of what the bytes mean.
    kv_scales: str
    num_layers: int
    num_kv_heads: int
    k_size: int
    v_size: int
    # "canonical", or "opaque:..." with whatever names the packing of the bytes.
    layout: str
    # A digest of the weight files, or "model_id:..." where the settings name the model.
    weights: str
    # What the engine does to these weights by itself ("none", "fp8", ...). Quantisation that the
    # files have themselves is in `weights`.
    quantization: str = "none"
    model_shape: dict[str, object]
    epoch: int
    # Of a model with several strands or with windows: what each strand is. The dimensions above are
    # those of the pages of the first one.
    strands: list[dict[str, object]] | msgspec.UnsetType = msgspec.UNSET


def without_strands(manifest: Manifest) -> Manifest:
    """What can be told without a running engine of a model with several strands or with windows;
    its `strands` are an empty list."""
    strands = [] if manifest.strands else manifest.strands
    unknown = dict.fromkeys(("num_layers", "num_kv_heads", "k_size", "v_size"), 0)
    return msgspec.structs.replace(manifest, layout="", strands=strands, **unknown)


def fingerprint(manifest: Manifest) -> bytes:
    """The 32 bytes that name the namespace."""
    return hashlib.sha256(canonical_json(msgspec.to_builtins(manifest))).digest()


def to_json(manifest: Manifest) -> bytes:
    """For people, and for `from_json`. The same bytes for the same manifest."""
    text = json.dumps(msgspec.to_builtins(manifest), sort_keys=True, indent=2, allow_nan=False)
    return text.encode() + b"\n"


def from_json(text: bytes) -> Manifest:
    """Raises UcmError for what is no manifest, which includes what has no fingerprint. Fields of a
    newer format are ignored: its format_version differs anyway."""
    try:
        manifest = msgspec.convert(json.loads(text), Manifest)
        for value in (manifest.model_shape, *(manifest.strands or ())):
            _check_depth(value, left=_MAX_DEPTH)
        # NaN and infinity, and text that is not Unicode: JSON can spell them.
        json.dumps(msgspec.to_builtins(manifest), allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UcmError(f"not the manifest of a namespace: {error}") from error
    return manifest


def is_of_another_version(text: bytes) -> bool:
    """Whether it is a manifest of another format, which may have other fields."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    version = found.get("format_version") if isinstance(found, dict) else None
    return isinstance(version, int) and version not in _FORMATS


def _check_depth(value: object, *, left: int) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, left=left - 1)


def differences(
    there: Manifest, here: Manifest, *, there_label: str = "there", here_label: str = "here"
) -> list[str]:
    """One readable line per field that differs, like "kv_dtype: bfloat16 (prefill) / float16
    (here)". Empty exactly when the fingerprints are equal."""
    apart = len(there.strands or ()) == len(here.strands or ())
    values_there, values_here = _values(there, apart=apart), _values(here, apart=apart)
    lines: list[str] = []
    for path in sorted({*values_there, *values_here}):
        value_there = values_there.get(path, _ABSENT)
        value_here = values_here.get(path, _ABSENT)
        if value_there != value_here:
            shown_there, shown_here = value_there.strip('"'), value_here.strip('"')
            if shown_there == shown_here:
                shown_there, shown_here = value_there, value_here
            name = ".".join(path)
            lines.append(f"{name}: {shown_there} ({there_label}) / {shown_here} ({here_label})")
    return lines


def _values(manifest: Manifest, *, apart: bool) -> dict[tuple[str, ...], str]:
    """By their paths. Strands field by field if the other manifest has as many (`apart`); else it
    is enough to say which there are."""
    fields = msgspec.to_builtins(manifest)
    strands = fields.get("strands")
    if strands and apart:
        fields["strands"] = {str(number): strand for number, strand in enumerate(strands)}
    elif strands:
        fields["strands"] = [strand.get("reach") for strand in strands]
    return dict(_leaves(fields))


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every value that is no mapping (or an empty one), as its path and its JSON."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path, canonical_json(value).decode()
